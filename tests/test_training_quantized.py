"""A base packed by bitsandbytes (QDyLoRA, arXiv 2402.10462): trained where that is installed, refused plainly elsewhere."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.checkpoint import read_peft
from adapters.commands.train import train
from adapters.errors import TrainingError
from tests.training_harness import model_folder, write_labelled, write_pairs

HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None
OPTIONS: dict[str, Any] = {"r_max": 4, "max_steps": 60, "learning_rate": 1e-2, "disable_tqdm": True, "save_steps": 30}


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("bf16", [False, True])
def test_an_adapter_is_trained_on_a_packed_base(tmp_path: Path, bits: str, bf16: bool) -> None:
    base, data = model_folder(tmp_path / "base"), write_pairs(tmp_path / "data.jsonl")
    start = train(base, data, tmp_path / "start", **{bits: True, "bf16": bf16, **OPTIONS, "max_steps": 1})
    more = {"gradient_checkpointing": True, "eval_data": data, "eval_steps": 20}  # it goes on after an evaluation
    report = train(base, data, tmp_path / "out", **more, **{bits: True, "bf16": bf16, **OPTIONS})
    for rank in (1, 4):
        assert report.metrics[f"eval_rank_{rank}_loss"] < 0.8 * start.metrics[f"eval_rank_{rank}_loss"]
    adapter = read_peft(tmp_path / "out")
    assert adapter.modules["model.layers.0.mlp.down_proj"].a.shape == (4, 48)
    assert {t.dtype for m in adapter.modules.values() for t in (m.a, m.b)} == {torch.float32}


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
def test_a_packed_classifier_keeps_a_head_that_learns(tmp_path: Path) -> None:
    base, data = model_folder(tmp_path / "base", "bert"), write_labelled(tmp_path / "data.jsonl")
    report = train(base, data, tmp_path / "out", load_in_4bit=True, **OPTIONS)
    assert report.metrics["eval_rank_4_accuracy"] > 0.8
    assert read_peft(tmp_path / "out").saved_modules["bert.pooler.dense.weight"].dtype is torch.float32


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_without_bitsandbytes_it_is_said_what_to_install(tmp_path: Path, bits: str) -> None:
    base, data = model_folder(tmp_path / "base"), write_pairs(tmp_path / "data.jsonl")
    with pytest.raises(TrainingError, match=r"not installed: pip install 'dylora-serve\[train,quantized\]'"):
        train(base, data, tmp_path / "out", **{bits: True, **OPTIONS})


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
def test_two_ways_of_packing_are_one_too_many(tmp_path: Path) -> None:
    base, data = model_folder(tmp_path / "base"), write_pairs(tmp_path / "data.jsonl")
    with pytest.raises(TrainingError, match="choose one of them"):
        train(base, data, tmp_path / "out", load_in_4bit=True, load_in_8bit=True, **OPTIONS)
