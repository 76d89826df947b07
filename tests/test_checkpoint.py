"""Reading and writing PEFT checkpoints: files that stock PEFT wrote keep their function on the way through."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from adapters.checkpoint import CONFIG_FILE, TENSORS_FILE, describe_peft, read_peft, write_peft
from adapters.checkpoint.peft_config import pattern_value
from adapters.config import AdapterKind
from adapters.errors import InvalidAdapter
from adapters.nesting import renest
from adapters.quality import Metric, QualityProfile
from tests.checkpoints import (
    OUT,
    PATH_Q,
    PREFIX,
    R,
    edit_config,
    plain_config,
    plain_tensors,
    random_adapter,
    rename_keys,
    write_folder,
)
from tests.tiny_models import TINY_KINDS, random_peft_adapter, some_tokens, stock_logits, tiny_model

WRITTEN_BY_PEFT: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in TINY_KINDS),
    ("llama", {"use_rslora": True, "lora_alpha": 5}),
    ("llama", {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 3}}),
    ("llama", {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}, "use_rslora": True}),
    ("opt", {"bias": "all"}),
    ("opt", {"bias": "lora_only"}),
    ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]}),
    ("llama", {"lora_bias": True}),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    ("qwen2", {"modules_to_save": ["embed_tokens"]}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("llama", {"dtype": torch.float16}),
    ("llama", {"dtype": torch.bfloat16}),
    ("mistral", {"target_modules": r".*\.(q|v)_proj"}),
    ("gemma", {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "layers_to_transform": [1]}),
]


def _id(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *case[1]])


@pytest.mark.parametrize("case", WRITTEN_BY_PEFT, ids=_id)
def test_stock_peft_computes_the_same_after_read_renest_and_write(tmp_path: Path, case: tuple[str, dict[str, Any]]) -> None:
    kind, settings = case
    tokens = some_tokens()
    random_peft_adapter(kind, tmp_path / "original", **settings)
    expected = stock_logits(kind, tmp_path / "original", tokens)
    assert (expected - tiny_model(kind)(tokens).logits).abs().max() > 1  # the adapter does something

    adapter = read_peft(tmp_path / "original")
    write_peft(adapter, tmp_path / "written")
    torch.testing.assert_close(stock_logits(kind, tmp_path / "written", tokens), expected, atol=1e-4, rtol=1e-4)

    nested = renest(adapter)
    write_peft(nested, tmp_path / "nested")
    torch.testing.assert_close(stock_logits(kind, tmp_path / "nested", tokens), expected, atol=1e-4, rtol=1e-4)
    assert read_peft(tmp_path / "nested").config == nested.config


@pytest.mark.parametrize(
    "renamed",
    [
        {"base_model.model.": ""},
        {"base_model.model.": "base_model.model.base_model.model."},
        {"base_model.model.": "module.base_model.model."},
        {"base_model.model.": "_orig_mod.base_model.model."},
        {"layers.0.": "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."},
        {"self_attn.": "self_attn._orig_mod."},
        {"lora_A.weight": "lora_A.default.weight", "lora_B.weight": "lora_B.default.weight"},
        {"lm_head.weight": "lm_head.modules_to_save.default.weight"},
        {"lm_head.weight": "lm_head.modules_to_save.weight"},
    ],
    ids=lambda renamed: "-".join(renamed.values()) or "no prefix",
)
def test_keys_are_read_in_every_style(tmp_path: Path, renamed: dict[str, str]) -> None:
    random_peft_adapter("llama", tmp_path, modules_to_save=["lm_head"])
    expected = read_peft(tmp_path)
    rename_keys(tmp_path, renamed)
    found = read_peft(tmp_path)
    assert set(found.modules) == set(expected.modules)
    for path, module in expected.modules.items():
        assert torch.equal(found.modules[path].a, module.a)
        assert torch.equal(found.modules[path].b, module.b)
    assert torch.equal(found.saved_modules["lm_head.weight"], expected.saved_modules["lm_head.weight"])


def test_the_scale_is_folded_into_b_by_module(tmp_path: Path) -> None:
    tensors = plain_tensors()
    folder = write_folder(tmp_path, plain_config(alpha_pattern={"v_proj": 12}, use_rslora=True), tensors)
    adapter = read_peft(folder)
    for module, alpha in (("self_attn.q_proj", 6), ("self_attn.v_proj", 12)):
        expected = tensors[f"{PREFIX}{module}.lora_B.weight"] * (alpha / math.sqrt(R))
        torch.testing.assert_close(adapter.modules[f"model.layers.0.{module}"].b, expected)
    assert adapter.config.kind is AdapterKind.LORA
    assert adapter.config.ranks == (R,)
    assert adapter.config.scale(R) == 1.0


def test_half_precision_is_kept_where_nothing_is_folded(tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in plain_tensors().items()}
    unscaled = read_peft(write_folder(tmp_path / "1", plain_config(lora_alpha=R), halves))
    assert unscaled.modules[PATH_Q].b.dtype is torch.float16
    scaled = read_peft(write_folder(tmp_path / "2", plain_config(lora_alpha=5), halves))
    assert scaled.modules[PATH_Q].b.dtype is torch.float32
    assert torch.equal(scaled.modules[PATH_Q].b, unscaled.modules[PATH_Q].b.float() * (5 / R))


@pytest.mark.parametrize(
    "path", ["model.layers.1.q_proj", "layers.1.q_proj", "model.layers.11.q_proj", "model.xq_proj", "q_proj"]
)
def test_patterns_match_as_stock_peft_matches_them(path: str) -> None:
    keys = ["^layers.1.q_proj", r"layers\.1\.q_proj$", "model.layers.11.q_proj", "^model.q_proj", "q_proj", "proj"]
    for start in range(len(keys)):
        pattern = {key: key for key in keys[start:]}
        expected = get_pattern_key(list(pattern), path)  # the path itself where nothing matches
        assert pattern_value(pattern, path) == pattern.get(expected)


def test_ranks_come_from_the_tensors_where_a_pattern_is_a_regex(tmp_path: Path) -> None:
    config = plain_config(r=99, rank_pattern={r".*_proj": R, r"(a+)+$": 4})
    assert read_peft(write_folder(tmp_path, config, plain_tensors())).config.r_max == R


def test_a_dylora_keeps_its_factors_dtype_and_ranks(tmp_path: Path) -> None:
    config = plain_config(
        use_rslora=True,
        dylora={"kind": "dylora", "alpha": 6, "ranks": [1, R], "rslora": True},
        base_model_name_or_path="b",
    )
    tensors = {name: tensor.bfloat16() for name, tensor in plain_tensors().items()}
    adapter = read_peft(write_folder(tmp_path / "in", config, tensors))
    assert adapter.config.kind is AdapterKind.DYLORA
    assert adapter.config.ranks == (1, R)
    assert adapter.config.scale(1) == 6
    assert adapter.config.scale(R) == 6 / math.sqrt(R)
    write_peft(adapter, tmp_path / "out")
    written = load_file(tmp_path / "out" / TENSORS_FILE)
    assert {name: tensor.dtype for name, tensor in written.items()} == dict.fromkeys(tensors, torch.bfloat16)
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert read_peft(tmp_path / "out").config == adapter.config


def test_stock_peft_computes_a_dylora_at_full_rank(tmp_path: Path) -> None:
    tokens = some_tokens()
    random_peft_adapter("llama", tmp_path / "a", r=4, lora_alpha=6)
    expected = stock_logits("llama", tmp_path / "a", tokens)
    edit_config(tmp_path / "a", dylora={"kind": "dylora"})
    adapter = read_peft(tmp_path / "a")
    assert (adapter.config.kind, adapter.config.alpha, adapter.config.ranks) == (AdapterKind.DYLORA, 6, (1, 2, 3, 4))
    write_peft(adapter, tmp_path / "b")
    torch.testing.assert_close(stock_logits("llama", tmp_path / "b", tokens), expected)


def test_a_renested_file_with_fewer_columns_in_a_module_has_scale_one_in_every_module(tmp_path: Path) -> None:
    adapter = random_adapter(AdapterKind.RENESTED, ranks={"m.q": 4, "m.v": 2})
    write_peft(adapter, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"m.v": 2}
    read = read_peft(tmp_path)
    assert read.config == adapter.config
    assert all(torch.equal(read.modules[path].b, module.b) for path, module in adapter.modules.items())


def test_writing_the_same_adapter_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    adapter = random_adapter(AdapterKind.RENESTED)
    for name in ("1", "2"):
        write_peft(adapter, tmp_path / name)
    for file in (CONFIG_FILE, TENSORS_FILE):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_a_read_adapter_does_not_change_with_its_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, plain_config(lora_alpha=R), plain_tensors())
    adapter = read_peft(folder)
    before = adapter.modules[PATH_Q].a.clone()
    write_folder(folder, plain_config(), {name: tensor * 0 for name, tensor in plain_tensors().items()})
    assert torch.equal(adapter.modules[PATH_Q].a, before)


def test_quality_travels_with_the_adapter(tmp_path: Path) -> None:
    profile = QualityProfile((Metric("rouge_l", True, {1: 0.5, 4: 0.75}),), "dev")
    adapter = random_adapter(AdapterKind.DYLORA)
    write_peft(type(adapter)(adapter.config, adapter.modules, quality=profile), tmp_path)
    assert read_peft(tmp_path).quality == profile
    write_peft(adapter, tmp_path)  # an older profile does not stay behind
    assert read_peft(tmp_path).quality is None


def test_a_dylora_with_uneven_columns_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match=r"m\.v: 2 columns, r_max is 4"):
        write_peft(random_adapter(AdapterKind.DYLORA, ranks={"m.q": 4, "m.v": 2}), tmp_path)


def test_training_fields_are_kept_for_export(tmp_path: Path) -> None:
    config = plain_config(task_type="CAUSAL_LM", lora_dropout=0.25, peft_version="0.1", eva_config={"rho": 2})
    write_peft(read_peft(write_folder(tmp_path / "a", config, plain_tensors())), tmp_path / "b")
    written = json.loads((tmp_path / "b" / CONFIG_FILE).read_text())
    assert (written["task_type"], written["lora_dropout"]) == ("CAUSAL_LM", 0.25)
    assert "eva_config" not in written


def test_heads_that_peft_lists_without_having_them_are_dropped(tmp_path: Path) -> None:
    tensors = plain_tensors() | {"base_model.model.classifier.weight": torch.ones(2, OUT)}
    adapter = read_peft(write_folder(tmp_path, plain_config(modules_to_save=["classifier", "score"]), tensors))
    assert list(adapter.saved_modules) == ["classifier.weight"]
    assert adapter.training["modules_to_save"] == ["classifier"]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_unlisted_embedding_is_replaced_in_the_base_itself(tmp_path: Path, kind: str) -> None:
    """PEFT's `save_embedding_layers`: a listed embedding would be a copy, which a tied output (Qwen2) does not follow."""
    folder, tokens = random_peft_adapter(kind, tmp_path / "a"), some_tokens()
    weight = tiny_model(kind).get_input_embeddings().get_parameter("weight")
    tensors = load_file(folder / TENSORS_FILE) | {"base_model.model.model.embed_tokens.weight": 0.5 * weight.detach()}
    write_folder(folder, json.loads((folder / CONFIG_FILE).read_text()), tensors)
    expected = stock_logits(kind, folder, tokens)
    adapter = read_peft(folder)
    assert list(adapter.saved_modules) == ["model.embed_tokens.weight"]
    write_peft(adapter, tmp_path / "b")
    assert json.loads((tmp_path / "b" / CONFIG_FILE).read_text())["modules_to_save"] is None
    torch.testing.assert_close(stock_logits(kind, tmp_path / "b", tokens), expected)


def test_describing_finds_the_same_without_the_values(tmp_path: Path) -> None:
    random_peft_adapter("llama", tmp_path)
    description, adapter = describe_peft(tmp_path), read_peft(tmp_path)
    assert description.config == adapter.config
    assert description.modules == tuple(sorted(adapter.modules))
