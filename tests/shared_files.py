"""The real data sets that developers and CI have beside the project; nobody else does."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("SHARED_FOLDER", Path(__file__).resolve().parent.parent.parent / "shared"))

needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared data are not here")
