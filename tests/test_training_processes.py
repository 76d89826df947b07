"""Training in several processes, started as people start it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from adapters.commands.train import train
from tests.training_harness import model_folder, tensors_of, write_labelled, write_pairs

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}


def launched(launcher: str, folder: Path, *arguments: object) -> str:
    """What `dylora train` in two gloo processes prints, with `folder` to work in."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "service.cli", "train", *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def typed(options: Mapping[str, object]) -> list[object]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_what_one_does_with_the_same_batches(tmp_path: Path, launcher: str) -> None:
    """Two gloo processes of 4 examples against one that accumulates twice 4. Sums are taken in another order: 1e-5."""
    base, data = model_folder(tmp_path / "base"), write_pairs(tmp_path / "data.jsonl")
    options = {"r_max": 4, "max_steps": 8, "per_device_train_batch_size": 4, "save_steps": 4, "learning_rate": 1e-2}
    evaluated = ["--eval-data", data, "--per-device-eval-batch-size", "5", "--disable-tqdm"]
    said = launched(launcher, tmp_path, "--model", base, "--data", data, "--out", "two", *typed(options), *evaluated)
    assert said.count("adapter: two, ranks 1 to 4, 8 steps") == 1
    one = train(base, data, tmp_path / "one", gradient_accumulation_steps=2, disable_tqdm=True, eval_data=data, **options)
    for name, tensor in tensors_of(tmp_path / "one").items():
        torch.testing.assert_close(tensors_of(tmp_path / "two")[name], tensor, rtol=1e-5, atol=1e-5)
    # 32 rows in batches of 5 don't divide by two processes: each must still count once.
    shown = "  ".join(f"{rank}: {one.metrics[f'eval_rank_{rank}_loss']:.3f}" for rank in (1, 2, 4))
    assert f"loss on {data} at rank  {shown}" in said


def test_a_classifiers_loss_and_gradient_are_means_over_the_step_however_it_is_cut(tmp_path: Path) -> None:
    """All 8 texts in every step: at once, in two micro-batches, in two processes. AdamW hides a factor; the log does not."""
    base, data = model_folder(tmp_path / "base"), write_labelled(tmp_path / "data.jsonl", 8)
    options = {"r_max": 4, "rank_per": "step", "max_steps": 2, "save_steps": 2, "logging_steps": 1}
    train(base, data, tmp_path / "whole", per_device_train_batch_size=8, disable_tqdm=True, **options)
    halves = {"per_device_train_batch_size": 4, **options}
    train(base, data, tmp_path / "halves", gradient_accumulation_steps=2, disable_tqdm=True, **halves)
    launched("torchrun", tmp_path, "--model", base, "--data", data, "--out", "two", "--disable-tqdm", *typed(halves))
    expected = logged(tmp_path / "whole")
    assert len(expected) == 4
    assert logged(tmp_path / "halves") == pytest.approx(expected, rel=1e-4)
    assert logged(tmp_path / "two") == pytest.approx(expected, rel=1e-4)


def logged(out: Path) -> list[float]:
    """Loss and gradient norm of each step."""
    state = json.loads((out / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] for name in ("loss", "grad_norm") if name in entry]
