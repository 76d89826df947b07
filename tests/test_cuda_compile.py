"""The GPU's kernels by Triton's compiler and NVIDIA's assembler, which need no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the GPU's kernels need triton (pip install '.[gpu]')")

SHARED_BYTES = 99 * 1024
"""What a block of threads can have on every GPU since 2020; A100 and H100 have more."""
SPILLED_BYTES = 128


def test_an_engine_does_without_kernels_that_can_not_run() -> None:
    program = (
        "import torch; from service.engine.backend import Backend; from service.engine.backend_choice import triton_backend;"
        "assert type(triton_backend(torch.device('cpu'))) is Backend"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}  # compiled kernels take no tensors of the CPU
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Triton's kernels can't run" in done.stderr


@pytest.mark.timeout(600)  # thirty kernels
def test_the_kernels_compile_and_fit_the_device(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.compile_cuda_kernels", "bfloat16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["capability"] for each in told} == {80, 90}
    assert not [each for each in told if each["shared_bytes"] > SHARED_BYTES or each["spilled_bytes"] > SPILLED_BYTES]
