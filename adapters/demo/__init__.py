"""The demonstration: a small base model and three adapters, trained from scratch on E2E and shipped as package data."""

from pathlib import Path

ARTIFACTS = Path(__file__).parent / "artifacts"
"""Where the trained files lie: `base/` and `adapters/<name>/`."""

BASE_NAME = "dylora-demo-base"
"""The base model's name, as the adapters' configs state it."""
