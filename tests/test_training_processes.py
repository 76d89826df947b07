"""Training in several processes, started as people start it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapters.commands.train import train
from tests.training_harness import model_folder, tensors_of, write_pairs

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_what_one_does_with_the_same_batches(tmp_path: Path, launcher: str) -> None:
    """Two gloo processes of 4 examples against one that accumulates twice 4. Sums are taken in another order: 1e-5."""
    base, data = model_folder(tmp_path / "base"), write_pairs(tmp_path / "data.jsonl")
    options = {"r_max": 4, "max_steps": 8, "per_device_train_batch_size": 4, "save_steps": 4, "learning_rate": 1e-2}
    typed = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    launch = [sys.executable, "-m", *LAUNCHERS[launcher]]
    command = ["-m", "service.cli", "train", "--model", str(base), "--data", str(data), "--out", "two", *typed]
    evaluated = ["--eval-data", str(data), "--per-device-eval-batch-size", "5"]
    done = subprocess.run(
        [*launch, *command, *evaluated, "--disable-tqdm"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter: two, ranks 1 to 4, 8 steps") == 1
    one = train(base, data, tmp_path / "one", gradient_accumulation_steps=2, disable_tqdm=True, eval_data=data, **options)
    for name, tensor in tensors_of(tmp_path / "one").items():
        torch.testing.assert_close(tensors_of(tmp_path / "two")[name], tensor, rtol=1e-5, atol=1e-5)
    # 32 rows in batches of 5 don't divide by two processes: each must still count once.
    shown = "  ".join(f"{rank}: {one.metrics[f'eval_rank_{rank}_loss']:.3f}" for rank in (1, 2, 4))
    assert f"loss on {data} at rank  {shown}" in done.stdout
