"""What holds for every test: no network, one torch thread per process, the same random numbers in every run."""

import os
import random
import sys
from pathlib import Path

# Before torch and transformers are imported, and inherited by the servers that tests start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(__file__).parents[1] / ".venv" / ".cache" / "hypothesis"))
os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels of the GPU, on tensors of the CPU; `make test-gpu` says 0

import hypothesis
import numpy as np
import pytest

# Deadlines measure the machine, not the code; the same examples in every run make a failure anyone's failure.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
