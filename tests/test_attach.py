"""An attached adapter computes at every rank what stock PEFT does with that rank's export."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.checkpoint import read_peft
from adapters.config import AdapterKind
from adapters.errors import IllegalRank, InvalidAdapter
from adapters.evaluation.attach import AttachedAdapter
from adapters.nesting import export_rank
from adapters.training.layer import set_rank, write_adapter
from tests.checkpoints import random_adapter
from tests.tiny_models import random_peft_adapter, some_tokens, stock_logits, tiny_model

TOKENS = some_tokens()

VARIETY: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True, "lora_alpha": 3}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 2}}),
    "conv1d": ("gpt2", {}),
    "every bias": ("qwen2", {"bias": "all"}),
    "biases of its modules": ("opt", {"bias": "lora_only"}),
    "lora_bias": ("opt", {"lora_bias": True}),
    "lora_bias where the base has none": ("llama", {"lora_bias": True}),
    "saved head": ("llama", {"modules_to_save": ["lm_head"]}),
    "tied embedding": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "scaled embedding": ("gemma", {"target_modules": ["embed_tokens", "q_proj"]}),
    "float16": ("llama", {"dtype": torch.float16}),
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize(("kind", "fields"), VARIETY.values(), ids=VARIETY.keys())
def test_every_rank_is_stock_pefts_and_the_base_comes_back(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = random_peft_adapter(kind, tmp_path / "adapter", **fields)
    model = tiny_model(kind)
    before = logits(model)
    attached = AttachedAdapter(model, read_peft(folder))
    assert torch.equal(logits(model), before)
    attached.select(attached.adapter.config.r_max)
    torch.testing.assert_close(logits(model), stock_logits(kind, folder, TOKENS), rtol=1e-3, atol=1e-3)
    export_rank(attached.adapter, 2, tmp_path / "rank2")
    attached.select(2)
    torch.testing.assert_close(logits(model), stock_logits(kind, tmp_path / "rank2", TOKENS), rtol=1e-3, atol=1e-3)
    attached.select(None)
    assert torch.equal(logits(model), before)


def test_a_dylora_computes_what_the_layer_it_was_trained_in_computes() -> None:
    paths = {f"model.layers.{layer}.self_attn.{name}": 4 for layer in (0, 1) for name in ("q_proj", "o_proj")}
    adapter = random_adapter(AdapterKind.DYLORA, ranks=paths, in_features=32, out_features=32, alpha=0.5)
    nested, merged = tiny_model("llama"), tiny_model("llama")
    write_adapter(nested, adapter)
    attached = AttachedAdapter(merged, adapter)
    for rank in adapter.config.ranks:
        set_rank(nested, rank)
        attached.select(rank)
        torch.testing.assert_close(logits(merged), logits(nested), rtol=1e-4, atol=1e-4)


def test_an_illegal_rank_changes_nothing() -> None:
    paths = {"model.layers.0.self_attn.q_proj": 2}
    model = tiny_model("llama")
    adapter = random_adapter(AdapterKind.DYLORA, ranks=paths, in_features=32, out_features=32)
    attached = AttachedAdapter(model, adapter)
    attached.select(1)
    at_rank_1 = logits(model)
    with pytest.raises(IllegalRank, match="legal ranks: 1, 2"):
        attached.select(3)
    assert torch.equal(logits(model), at_rank_1)


def test_everything_that_does_not_fit_is_named() -> None:
    adapter = random_adapter(
        AdapterKind.DYLORA,
        ranks={"model.layers.7.q_proj": 2, "model.layers.0.self_attn.q_proj": 2, "model.norm": 2},
    )
    with pytest.raises(InvalidAdapter) as caught:
        AttachedAdapter(tiny_model("llama"), adapter)
    assert [problem.split(":")[0] for problem in caught.value.problems] == list(adapter.modules)
    assert "no such module" in str(caught.value)
    assert "made for out, in = (10, 12), the base model has (32, 32)" in str(caught.value)
    assert "can't take this low-rank update" in str(caught.value)


def test_quantised_weights_are_refused_by_name() -> None:
    model = tiny_model("llama")
    projection = model.get_submodule("model.layers.0.self_attn.q_proj")
    projection.weight = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)
    adapter = random_adapter(AdapterKind.DYLORA, ranks={"model.layers.0.self_attn.q_proj": 2}, in_features=32, out_features=32)
    with pytest.raises(InvalidAdapter, match=r"model.layers.0.self_attn.q_proj: its weight is quantised"):
        AttachedAdapter(model, adapter)
