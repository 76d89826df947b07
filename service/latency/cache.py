"""What a sweep measured, on disk: one small file for each model on each kind of machine."""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from service.core import Mode, ModelFacts
from service.rank.latency_model import FEATURES, Statistics
from service.settings import Settings
from service.version import VERSION

MAX_BYTES = 256 << 10
"""No file is larger; one that is, is not read."""
_FORMAT = 2


def cache_path(settings: Settings, facts: ModelFacts) -> Path:
    """Where the statistics of this model on this machine belong, by a digest of all that its steps' seconds depend on.

    Of the model that is its shape, not its weights: two of one architecture and size take the same time.
    """
    identity = {
        "format": [_FORMAT, FEATURES, VERSION],
        "model": [facts.model_type, facts.parameters, facts.nbytes, facts.vocab_size, facts.dtype, facts.device],
        "engine": settings.model_dump(mode="json", include={"device", "dtype", "threads", "compile"}),
        "machine": [platform.machine(), _processor(), os.cpu_count(), torch.get_num_threads()],
        "device": torch.cuda.get_device_name() if facts.device == "cuda" else None,
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return settings.latency_cache_dir / f"{digest[:32]}.json"


def write_statistics(path: Path, statistics: Mapping[Mode, Statistics]) -> None:
    """Write them atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": _FORMAT, "statistics": {mode.value: each.to_json() for mode, each in statistics.items()}}
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        json.dump(content, file)
    os.replace(file.name, path)


def read_statistics(path: Path) -> dict[Mode, Statistics] | None:
    """What `write_statistics` wrote; None where there is no file.

    Raises:
        ValueError: the file can't be read, or holds something else.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES} bytes")
    try:
        content = json.loads(raw)
        if not isinstance(content, dict) or content.get("format") != _FORMAT or not isinstance(content.get("statistics"), dict):
            raise ValueError(f"not of format {_FORMAT}")
        return {Mode(mode): Statistics.from_json(each) for mode, each in content["statistics"].items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
