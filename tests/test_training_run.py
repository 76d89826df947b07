"""A whole run: its folder, its log, and what is left of it when it is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from adapters.checkpoint import read_peft
from adapters.commands.train import train
from adapters.errors import AdapterError, DataError, IllegalRank, InvalidAdapter, TrainingError
from adapters.training.layer import set_rank, write_adapter
from tests.tiny_models import some_tokens, stock_logits
from tests.training_harness import are_equal, model_folder, tensors_of, word_tokenizer, write_lines, write_pairs

ROOT = Path(__file__).resolve().parent.parent
QUICK: dict[str, Any] = {"r_max": 4, "max_steps": 6, "per_device_train_batch_size": 4, "disable_tqdm": True, "save_steps": 0}

ENDED_IN_STEP_5 = """
import os, signal, sys
from transformers import TrainerCallback, trainer

class End(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.{signal})

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs lack
trainer.DEFAULT_CALLBACKS.append(End)
from service.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and with data.jsonl."""
    folder = model_folder(tmp_path_factory.mktemp("base"))
    write_pairs(folder / "data.jsonl")
    return folder


def test_a_run_that_was_killed_goes_on_and_ends_with_the_bits_of_one_that_was_not(tmp_path: Path, base: Path) -> None:
    options = {"--r-max": 4, "--max-steps": 8, "--save-steps": 2, "--per-device-train-batch-size": 4, "--lora-dropout": 0.1}
    arguments = ["train", "--model", base, "--data", base / "data.jsonl", "--disable-tqdm"]
    command = [str(part) for part in (*arguments, *(part for pair in options.items() for part in pair))]

    def started(*python: str, out: str, resume: bool = False) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, *python, *command, "--out", out, *(["--resume"] if resume else [])]
        return subprocess.run(line, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)

    killed = started("-c", ENDED_IN_STEP_5.format(signal="SIGKILL"), out="killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "adapter_config.json").exists()
    assert (tmp_path / "killed" / "checkpoints" / "checkpoint-4" / "complete").exists()
    interrupted = started("-c", ENDED_IN_STEP_5.format(signal="SIGINT"), out="interrupted")
    assert interrupted.returncode == 130 and "Traceback" not in interrupted.stderr
    way_on = "the same command with --resume goes on from interrupted/checkpoints/checkpoint-4"
    assert interrupted.stderr.splitlines()[-1] == f"dylora: stopped; {way_on}"
    resumed = started("-m", "service.cli", out="killed", resume=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "adapter: killed, ranks 1 to 4, 8 steps" in resumed.stdout
    assert f"dylora serve --model {base}" in resumed.stdout
    typed = {name[2:].replace("-", "_"): value for name, value in options.items()}
    train(base, base / "data.jsonl", tmp_path / "whole", disable_tqdm=True, **typed)
    assert are_equal(tensors_of(tmp_path / "killed"), tensors_of(tmp_path / "whole"))


def test_the_adapter_is_peft_of_kind_dylora_and_the_same_function_for_stock_peft(tmp_path: Path, base: Path) -> None:
    train(base, base / "data.jsonl", tmp_path / "out", **{**QUICK, "r_max": None, "ranks": "1,2,4", "learning_rate": 0.05})
    adapter = read_peft(tmp_path / "out")
    assert (adapter.config.kind, adapter.config.ranks) == ("dylora", (1, 2, 4))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
    }
    model = AutoModelForCausalLM.from_pretrained(base)
    write_adapter(model, adapter)
    set_rank(model, 4)
    with torch.no_grad():
        torch.testing.assert_close(
            stock_logits("llama", tmp_path / "out", some_tokens()), model(some_tokens()).logits, rtol=1e-4, atol=1e-4
        )


def test_the_log_is_written_for_tensorboard_with_the_loss_at_several_ranks(tmp_path: Path, base: Path) -> None:
    data = base / "data.jsonl"
    report = train(
        base, data, tmp_path / "out", eval_data=data, eval_steps=3, logging_steps=2, report_to="tensorboard", **QUICK
    )
    logs = tmp_path / "out" / "checkpoints" / "logs"
    events = EventAccumulator(str(logs))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    for rank in (1, 2, 4):
        measured = events.Scalars(f"eval/rank_{rank}_loss")
        assert [event.step for event in measured] == [3, 6]
        assert measured[-1].value == pytest.approx(report.metrics[f"eval_rank_{rank}_loss"])
    assert [path.name for path in logs.parent.iterdir() if path.is_dir()] == ["logs"]


def test_a_folder_that_is_not_free_is_refused(tmp_path: Path, base: Path) -> None:
    data, out = base / "data.jsonl", tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(TrainingError, match=r"out is not empty \(thesis.txt\)"):
            train(base, data, out, resume=resume, **QUICK)
    with pytest.raises(TrainingError, match="is a file"):
        train(base, data, out / "thesis.txt", **QUICK)
    train(base, data, tmp_path / "done", **QUICK)
    with pytest.raises(TrainingError, match="holds a run already"):
        train(base, data, tmp_path / "done", **QUICK)


def test_a_resumed_run_replaces_no_adapter_but_its_own(tmp_path: Path, base: Path) -> None:
    """Where checkpoints lie elsewhere, `out` may be taken by another run meanwhile."""
    data, out, other = base / "data.jsonl", tmp_path / "out", tmp_path / "other"
    options = {**QUICK, "checkpoint_dir": tmp_path / "checkpoints", "resume": True}
    train(base, data, out, **options)
    (out / "quality.json").write_text("{}")
    finished = tensors_of(out)
    train(base, data, out, **options)  # its own, with what was measured of it
    assert are_equal(finished, tensors_of(out))
    train(base, data, other, **{**QUICK, "seed": 1})
    taken = tensors_of(other)
    for resumed in (other, base):
        with pytest.raises(
            TrainingError, match=f"{resumed.name} holds what is not of the run in .*checkpoints .*choose another"
        ):
            train(base, data, resumed, **options)
    assert are_equal(taken, tensors_of(other))
    train(base, data, tmp_path / "new", **options)
    assert are_equal(finished, tensors_of(tmp_path / "new"))


def test_a_run_is_not_resumed_with_other_settings_or_other_data(tmp_path: Path, base: Path) -> None:
    data, out = base / "data.jsonl", tmp_path / "out"
    train(base, data, out, resume=True, **QUICK)  # nothing to resume yet: it starts
    finished = tensors_of(out)
    with pytest.raises(TrainingError) as caught:
        train(base, data, out, resume=True, **{**QUICK, "r_max": 2, "learning_rate": 0.1, "init_scale": 0.5})
    for said in ("dylora.init_scale was ", "dylora.r_max was 4, now 2; learning_rate was 0.002, now 0.1"):
        assert said in str(caught.value)
    with pytest.raises(TrainingError, match="data_sha256 was"):
        train(base, write_pairs(tmp_path / "less.jsonl", 16), out, resume=True, **QUICK)
    train(base, data, out, resume=True, logging_steps=1, **QUICK)
    assert are_equal(finished, tensors_of(out))


def test_a_run_that_could_not_start_leaves_nothing(tmp_path: Path, base: Path) -> None:
    data, out = base / "data.jsonl", tmp_path / "out"
    (tmp_path / "bad.jsonl").write_text("{")
    shutil.copytree(base, tmp_path / "headless")
    (tmp_path / "headless" / "model.safetensors").unlink()
    refused: list[tuple[dict[str, Any], type[AdapterError], str]] = [
        ({"model": tmp_path / "nowhere"}, TrainingError, "nowhere"),
        ({"model": tmp_path / "headless"}, TrainingError, "can't be loaded for causal-lm"),
        ({"data": tmp_path / "bad.jsonl"}, DataError, "bad.jsonl"),
        ({"eval_steps": 2}, TrainingError, "no eval_data"),
        ({"eval_ranks": (3, 9)}, IllegalRank, "rank 9 is not a rank"),
        ({"ranks": (1, 2, 8)}, InvalidAdapter, "end with r_max"),
        ({"ranks": "1-x"}, TrainingError, "ranks: '1-x' is neither a range"),
        ({"optim": "sgd"}, TrainingError, "optim: 'sgd' is not"),
        ({"target_modules": "q_proj,c_attn"}, InvalidAdapter, "'c_attn' matches no module"),
        ({"update_rule": "frozen"}, TrainingError, "row-adamw"),
        ({"format": "glue"}, DataError, "glue"),
    ]
    for changes, error, said in refused:
        with pytest.raises(error, match=said):
            train(**{"model": base, "data": data, "out": out, **QUICK, **changes})
        assert not out.exists(), changes
    with pytest.raises(TypeError, match="lr"):
        train(base, data, out, lr=1.0)
    with pytest.raises(TrainingError, match=r"bad\.jsonl/deep/out can't be made"):  # told before the model is loaded
        train(tmp_path / "nowhere", data, tmp_path / "bad.jsonl" / "deep" / "out", **QUICK)


def test_files_that_cannot_be_written_or_read_are_one_line(tmp_path: Path, base: Path) -> None:
    data, out = base / "data.jsonl", tmp_path / "out"
    train(base, data, out, **QUICK)
    in_the_way = out / "checkpoints" / "checkpoint-2"
    in_the_way.write_text("")
    with pytest.raises(TrainingError, match=r"out/checkpoints can't go on: .*checkpoint-2"):
        train(base, data, out, resume=True, **QUICK | {"save_steps": 2})
    in_the_way.unlink()
    train(base, data, out, resume=True, **QUICK | {"save_steps": 2})
    (out / "checkpoints" / "checkpoint-6" / "trained.safetensors").write_bytes(b"cut short")
    with pytest.raises(
        TrainingError, match=r"checkpoint-6/trained.safetensors can't be read .*; delete .*checkpoint-6 to go on"
    ):
        train(base, data, out, resume=True, **QUICK)


def test_examples_beyond_max_length_are_cut_and_it_is_told(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = write_lines(tmp_path / "long.jsonl", [{"prompt": "w1 w2", "completion": " w3" * 20}] * 8)
    train(base, long, tmp_path / "out", max_length=10, **QUICK)
    assert "8 of the examples are longer than 10 tokens and cut" in caplog.text
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "w1" + " w2" * 4 * i, "label": f"{i}"} for i in (0, 1, 9)])
    train(base, texts, tmp_path / "classes", max_length=10, **QUICK)
    assert "1 of the examples are longer than 10 tokens and cut" in caplog.text


def test_label_smoothing_changes_what_is_trained_and_not_how_it_is_measured(tmp_path: Path, base: Path) -> None:
    data = base / "data.jsonl"
    options = {**QUICK, "learning_rate": 1e-9}
    plain, smooth = (
        train(base, data, tmp_path / str(factor), label_smoothing_factor=factor, **options) for factor in (0.0, 0.5)
    )
    assert plain.metrics == pytest.approx(smooth.metrics, rel=1e-4)
    assert not are_equal(tensors_of(plain.out), tensors_of(smooth.out))


def test_a_model_in_memory_is_adapted_in_place(tmp_path: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    train(
        model, base / "data.jsonl", tmp_path / "out", tokenizer=word_tokenizer(), target_modules=["q_proj", "v_proj"], **QUICK
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {path.rpartition(".")[2] for path in config["target_modules"]} == {"q_proj", "v_proj"}
    assert config["base_model_name_or_path"] == str(base)
