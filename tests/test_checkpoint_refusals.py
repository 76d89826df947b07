"""Checkpoints that must not be served: each is refused with a reason that names every offender."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.checkpoint import CONFIG_FILE, QUALITY_FILE, TENSORS_FILE, CheckpointLimits, read_peft
from adapters.checkpoint.peft_config import IGNORED_FIELDS, READ_FIELDS, REFUSED_FIELDS
from adapters.errors import AdapterTooLarge, InvalidAdapter
from tests.checkpoints import (
    IN,
    OUT,
    PATH_Q,
    PATH_V,
    PREFIX,
    Q,
    R,
    V,
    plain_config,
    plain_tensors,
    safetensors_bytes,
    write_folder,
)
from tests.tiny_models import random_peft_adapter

Tensors = dict[str, Tensor]
A_Q, B_Q = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
A_V, B_V = f"{PREFIX}{V}.lora_A.weight", f"{PREFIX}{V}.lora_B.weight"


def _without(*names: str) -> Tensors:
    return {name: tensor for name, tensor in plain_tensors().items() if name not in names}


def _with(**by_suffix: Tensor) -> Tensors:
    return plain_tensors() | {PREFIX + name: tensor for name, tensor in by_suffix.items()}


def _poisoned(value: float, *names: str) -> Tensors:
    tensors = plain_tensors()
    for name in names:
        tensors[name][0, 0] = value
    return tensors


BAD_CONFIGS: list[tuple[dict[str, Any] | list[Any], list[str]]] = [
    ([], ["adapter_config.json: must be a JSON object"]),
    (plain_config(peft_type="IA3"), ["peft_type is 'IA3'; only LORA is served"]),
    (plain_config(peft_type="ADALORA"), ["peft_type is 'ADALORA'"]),
    ({"lora_alpha": 6}, ["peft_type is 'None'"]),
    (plain_config(use_dora=True), ["use_dora is set: DoRA is not served yet"]),
    (plain_config(alora_invocation_tokens=[]), ["alora_invocation_tokens is set: aLoRA"]),
    (plain_config(use_qalora=True), ["use_qalora is set"]),
    (plain_config(use_bdlora={"nblocks": 2}), ["use_bdlora is set: block-diagonal"]),
    (plain_config(kasa_config={"beta": 1}), ["kasa_config is set"]),
    (plain_config(monteclora_config={"num_samples": 2}), ["monteclora_config is set"]),
    (plain_config(arrow_config={"top_k": 3}), ["arrow_config is set"]),
    (plain_config(layer_replication=[[0, 2]]), ["layer_replication is set"]),
    (plain_config(megatron_config={"a": 1}), ["megatron_config is set"]),
    (plain_config(target_parameters=["experts.up"]), ["target_parameters is set"]),
    (plain_config(trainable_token_indices=[1]), ["trainable_token_indices is set"]),
    (plain_config(ensure_weight_tying=True), ["ensure_weight_tying is set"]),
    (
        plain_config(init_lora_weights="pissa_niter_16"),
        ["init_lora_weights is 'pissa_niter_16', which changed the base"],
    ),
    (plain_config(init_lora_weights="olora"), ["'olora', which changed the base"]),
    (plain_config(init_lora_weights="corda"), ["'corda', which changed the base"]),
    (plain_config(init_lora_weights="lora_ga"), ["'lora_ga', which changed the base"]),
    (plain_config(init_lora_weights="new_thing"), ["'new_thing', of which it is not known"]),
    (plain_config(lora_alpha=None), ["lora_alpha is missing"]),
    (plain_config(lora_alpha=0), ["lora_alpha must be a positive number, not '0'"]),
    (plain_config(lora_alpha=float("inf")), ["lora_alpha must be a positive number, not 'inf'"]),
    (plain_config(lora_alpha=True), ["lora_alpha must be a positive number, not 'True'"]),
    (plain_config(lora_alpha=1e300), ["lora_alpha must be a positive number"]),
    (plain_config(lora_alpha=1e200), [f"{PATH_Q}: B times its scale is too large", f"{PATH_V}: B times its scale"]),
    (plain_config(r="8"), ["r must be a positive integer, not '8'"]),
    (plain_config(r=4), [f"{PATH_Q}: 3 columns in the tensors, rank 4 in the config", f"{PATH_V}: 3 columns"]),
    (plain_config(rank_pattern={"q_proj": 2}), [f"{PATH_Q}: 3 columns in the tensors, rank 2 in the config"]),
    (plain_config(rank_pattern={"q_proj": 2.5}), ["rank_pattern must be an object from module name to rank"]),
    (plain_config(alpha_pattern=[1]), ["alpha_pattern must be an object from module name to positive number"]),
    (
        plain_config(alpha_pattern={".*q": 1, "(a+)+$": 2}),
        ["alpha_pattern: '(a+)+$' is a regular expression", "alpha_pattern: '.*q' is a regular expression"],
    ),
    (plain_config(use_rslora="yes"), ["use_rslora must be true or false, not 'yes'"]),
    (plain_config(bias="some"), ["bias must be none, all or lora_only, not 'some'"]),
    (plain_config(modules_to_save="head"), ["modules_to_save must be a list of module names"]),
    (plain_config(target_modules=["q_proj"]), [f"{PATH_V}: has factors, but the config's target_modules"]),
    (plain_config(target_modules=[3]), ["target_modules must be a list of module names, or a string"]),
    (plain_config(base_model_name_or_path="\ud800"), ["base_model_name_or_path must be a string"]),
    (plain_config(dylora=True), ["dylora must be an object with the keys kind, alpha, ranks, rslora, labels"]),
    (plain_config(dylora={"kind": "dylora", "labels": ["a", "a"]}), ["dylora.labels must be a list of different names"]),
    (plain_config(dylora={"kind": "nested"}), ["dylora.kind is 'nested'; legal: dylora, renested, lora"]),
    (plain_config(dylora={"kind": ["dylora"]}), ["dylora.kind is"]),
    (plain_config(dylora={"kind": "dylora", "rank": 1}), ["dylora must be an object with the keys", "['rank']"]),
    (plain_config(dylora={"kind": "dylora", "alpha": 7}), ["dylora.alpha is 7, lora_alpha 6"]),
    (plain_config(dylora={"kind": "dylora", "rslora": True}), ["dylora.rslora is True, use_rslora False"]),
    (plain_config(dylora={"kind": "dylora", "ranks": [1, 4]}), ["ranks must ascend within 1..3 and end with r_max"]),
    (plain_config(dylora={"kind": "dylora", "ranks": [2, 1, 3]}), ["ranks must ascend"]),
    (plain_config(dylora={"kind": "dylora", "ranks": "all"}), ["dylora.ranks must be a list of ranks"]),
    (plain_config(dylora={"kind": "dylora"}, alpha_pattern={"q_proj": 1}), ["a DyLoRA can't have an alpha_pattern"]),
    (
        plain_config(use_dora=True, peft_type="LOHA", bias=1, init_lora_weights="pissa"),
        ["peft_type is 'LOHA'", "use_dora is set", "'pissa', which changed", "bias must be"],
    ),
]


@pytest.mark.parametrize(("config", "messages"), BAD_CONFIGS, ids=lambda value: str(value)[-40:])
def test_a_bad_config_is_refused(tmp_path: Path, config: object, messages: list[str]) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        read_peft(write_folder(tmp_path, config, plain_tensors()))
    for message in messages:
        assert message in str(caught.value)


BAD_TENSORS: list[tuple[str, Tensors, list[str]]] = [
    ("A without B", _without(B_Q, A_V), [f"{PATH_Q}: lora_A without lora_B", f"{PATH_V}: lora_B without lora_A"]),
    ("NaN", _poisoned(float("nan"), A_Q, B_V), [f"{A_Q}: NaN or Inf", f"{B_V}: NaN or Inf"]),
    ("Inf", _poisoned(float("-inf"), B_Q), [f"{B_Q}: NaN or Inf"]),
    (
        "ranks",
        plain_tensors() | {B_Q: torch.ones(OUT, 2)},
        [f"{PATH_Q}: lora_A [3, 6] and lora_B [5, 2] differ in rank"],
    ),
    (
        "convolution",
        plain_tensors() | {A_Q: torch.ones(R, IN, 1, 1)},
        [f"{PATH_Q}: lora_A [3, 6, 1, 1]", "no convolutions"],
    ),
    (
        "dtype",
        plain_tensors() | {A_Q: torch.ones(R, IN, dtype=torch.float64)},
        [f"{A_Q}: dtype 'F64'; legal: F16, BF16, F32"],
    ),
    ("integers", plain_tensors() | {A_Q: torch.ones(R, IN, dtype=torch.int8)}, [f"{A_Q}: dtype 'I8'"]),
    (
        "DoRA",
        _with(**{f"{Q}.lora_magnitude_vector": torch.ones(OUT)}),
        [f"{PREFIX}{Q}.lora_magnitude_vector: a magnitude of DoRA"],
    ),
    ("lora_bias", _with(**{f"{Q}.lora_B.bias": torch.ones(OUT)}), [f"{PATH_Q}: has lora_B.bias, while the config"]),
    (
        "lora_bias shape",
        _with(**{f"{Q}.lora_B.bias": torch.ones(2)}),
        [f"{PATH_Q}: lora_B.bias [2] does not fit lora_B [5, 3]"],
    ),
    ("lora_A bias", _with(**{f"{Q}.lora_A.bias": torch.ones(2)}), [f"{PREFIX}{Q}.lora_A.bias: not a tensor of a LoRA"]),
    ("KaSA", _with(**{f"{Q}.lora_diag": torch.ones(2)}), [f"{PREFIX}{Q}.lora_diag: not a tensor of a LoRA"]),
    (
        "base bias",
        _with(**{f"{Q}.base_layer.bias": torch.ones(OUT)}),
        [f"{PREFIX}{Q}.base_layer.bias: a bias of the base model"],
    ),
    (
        "unlisted",
        _with(**{"norm.weight": torch.ones(4)}),
        [f"{PREFIX}norm.weight: not a tensor of a LoRA, and not listed"],
    ),
    (
        "base weights",
        _with(**{f"{Q}.base_layer.weight": torch.ones(OUT, IN)}),
        [f"{PREFIX}{Q}.base_layer.weight: not a tensor"],
    ),
    ("twice", _with(**{f"{Q}.lora_A.default.weight": torch.ones(R, IN)}), ["means the same tensor as"]),
    (
        "both",
        _with(**{f"{Q}.lora_embedding_A": torch.ones(R, IN)}),
        [f"{PATH_Q}: has lora_A, lora_B beside lora_embedding_A"],
    ),
    (
        "no LoRA",
        {"classifier.weight": torch.ones(2, 2)},
        ["no tensor is a LoRA factor", "classifier.weight: not a tensor"],
    ),
    ("no tensors", {}, ["no tensor"]),
]


@pytest.mark.parametrize(("tensors", "messages"), [case[1:] for case in BAD_TENSORS], ids=[case[0] for case in BAD_TENSORS])
def test_bad_tensors_are_refused(tmp_path: Path, tensors: Tensors, messages: list[str]) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        read_peft(write_folder(tmp_path, plain_config(), tensors))
    for message in messages:
        assert message in str(caught.value)


def test_a_dylora_must_have_all_columns_everywhere(tmp_path: Path) -> None:
    tensors = plain_tensors() | {A_V: torch.ones(2, IN), B_V: torch.ones(OUT, 2)}
    config = plain_config(dylora={"kind": "dylora"}, rank_pattern={"v_proj": 2})
    with pytest.raises(InvalidAdapter, match=f"{PATH_V}: 2 columns, while a DyLoRA has r_max = 3"):
        read_peft(write_folder(tmp_path, config, tensors))


def test_a_dylora_can_not_have_lora_bias(tmp_path: Path) -> None:
    tensors = _with(**{f"{Q}.lora_B.bias": torch.ones(OUT)})
    with pytest.raises(InvalidAdapter, match="a DyLoRA can't have lora_bias"):
        read_peft(write_folder(tmp_path, plain_config(dylora={"kind": "dylora"}, lora_bias=True), tensors))


def test_an_embedding_of_another_size_than_its_factors_is_refused(tmp_path: Path) -> None:
    path = "base_model.model.model.embed_tokens"
    tensors = {
        f"{path}.lora_embedding_A": torch.ones(R, 10),
        f"{path}.lora_embedding_B": torch.ones(4, R),
        f"{path}.base_layer.weight": torch.ones(12, 4),
    }
    with pytest.raises(InvalidAdapter, match=r"base_layer.weight: \[12, 4\] does not fit"):
        read_peft(write_folder(tmp_path, plain_config(target_modules=["embed_tokens"]), tensors))


def _entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_FILES: list[tuple[bytes, str]] = [
    (b"", "not a safetensors file, or cut short"),
    (b"\0" * 7, "not a safetensors file, or cut short"),
    (safetensors_bytes({}, length=1000), "not a safetensors file, or cut short"),
    (safetensors_bytes({}, length=(1 << 64) - 1), "not a safetensors file, or cut short"),
    (safetensors_bytes(b"{]"), "its header is not valid JSON"),
    (safetensors_bytes(b"\xff\xfe{}"), "its header is not valid JSON"),
    (safetensors_bytes(b"[" * 200_000), "its header is not valid JSON"),
    (safetensors_bytes([1, 2]), "its header is not a JSON object"),
    (safetensors_bytes(b'{"a": 1, "a": 2}'), "its header is not valid JSON"),
    (safetensors_bytes({"a": 3}), "a: its header entry must have dtype, shape and data_offsets"),
    (safetensors_bytes({"a": {**_entry(), "x": 1}}), "a: its header entry must have dtype, shape and data_offsets"),
    (safetensors_bytes({"a": _entry(dtype="F8_E4M3")}, b"\0" * 4), "a: dtype 'F8_E4M3'"),
    (safetensors_bytes({"a": _entry(shape=[-1, 2])}), "a: shape '[-1, 2]' is not"),
    (safetensors_bytes({"a": _entry(shape=[0, 2])}), "a: shape '[0, 2]' is not"),
    (safetensors_bytes({"a": _entry(shape=[True, 4])}), "a: shape '[True, 4]' is not"),
    (safetensors_bytes({"a": _entry(shape=[2.0, 2])}), "a: shape '[2.0, 2]' is not"),
    (safetensors_bytes({"a": _entry(shape=[1] * 9)}), "is not 1 to 8 positive integers"),
    (safetensors_bytes({"a": _entry(shape=[1 << 40, 1 << 40])}), "a: data_offsets"),
    (
        safetensors_bytes({"a": _entry(offsets=[0, 15])}, b"\0" * 15),
        "a: data_offsets '[0, 15]' do not span the 16 bytes",
    ),
    (safetensors_bytes({"a": _entry(offsets=[16, 0])}, b"\0" * 16), "a: data_offsets"),
    (safetensors_bytes({"a": _entry()}, b"\0" * 8), "the tensors end at byte"),
    (safetensors_bytes({"a": _entry()}, b"\0" * 24), "the tensors end at byte"),
    (safetensors_bytes({"a": _entry(), "b": _entry()}, b"\0" * 16), "b begins at byte"),
    (safetensors_bytes({"a": _entry(offsets=[8, 24])}, b"\0" * 24), "a begins at byte"),
    (safetensors_bytes({"a\nb": _entry()}, b"\0" * 16), "tensor name 'a\\nb'"),
    (safetensors_bytes({"\ud800": _entry()}, b"\0" * 16), "not 1 to 512 printable ASCII"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES, ids=[message[:30] for _, message in BAD_FILES])
def test_a_damaged_tensor_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        read_peft(write_folder(tmp_path, plain_config(), content))
    assert message in str(caught.value)
    assert all(problem.startswith(TENSORS_FILE) for problem in caught.value.problems)


def test_problems_of_both_files_and_of_the_profile_are_named_together(tmp_path: Path) -> None:
    write_folder(tmp_path, plain_config(use_dora=True, r="x"), _without(B_Q) | {A_V: torch.full((R, IN), float("nan"))})
    (tmp_path / QUALITY_FILE).write_text("{}")
    with pytest.raises(InvalidAdapter) as caught:
        read_peft(tmp_path)
    for message in (
        "use_dora",
        "r must be",
        f"{PATH_Q}: lora_A without lora_B",
        f"{A_V}: NaN",
        "quality.json: metrics",
    ):
        assert any(message in problem for problem in caught.value.problems)


def test_a_pickle_is_refused_by_name_and_never_loaded(tmp_path: Path) -> None:
    write_folder(tmp_path, plain_config(), plain_tensors())
    (tmp_path / TENSORS_FILE).unlink()
    torch.save(plain_tensors(), tmp_path / "adapter_model.bin")
    with pytest.raises(InvalidAdapter, match=r"adapter_model.bin: a pickle, which is never loaded"):
        read_peft(tmp_path)


@pytest.mark.parametrize("missing", [CONFIG_FILE, TENSORS_FILE])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    write_folder(tmp_path, plain_config(), plain_tensors())
    (tmp_path / missing).unlink()
    with pytest.raises(InvalidAdapter, match=missing):
        read_peft(tmp_path)


def test_a_missing_folder_is_invalid(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="missing"):
        read_peft(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        (CheckpointLimits(max_rank=2), InvalidAdapter, f"{PATH_V}: rank 3, the limit is 2"),
        (CheckpointLimits(max_bytes=100), AdapterTooLarge, "the limit is 100"),
        (CheckpointLimits(max_tensors=3), AdapterTooLarge, "4 tensors, the limit is 3"),
        (CheckpointLimits(max_header_bytes=50), AdapterTooLarge, "the limit is 50"),
        (CheckpointLimits(max_config_bytes=20), InvalidAdapter, "adapter_config.json: larger than 20 bytes"),
    ],
)
def test_limits_hold(tmp_path: Path, limits: CheckpointLimits, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_peft(write_folder(tmp_path, plain_config(), plain_tensors()), limits=limits)


def test_a_limit_below_one_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="max_rank must be at least 1, not 0"):
        CheckpointLimits(max_rank=0)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda folder: random_peft_adapter("llama", folder, use_dora=True),
        lambda folder: random_peft_adapter("llama", folder, init_lora_weights="pissa"),
        lambda folder: random_peft_adapter("llama", folder, trainable_token_indices=[1, 2]),
        lambda folder: save_file({"prompt_embeddings": torch.ones(2, 2)}, str(folder / TENSORS_FILE)),
    ],
    ids=["DoRA", "PiSSA", "trained tokens", "prompt tuning"],
)
def test_what_stock_peft_writes_for_variants_is_refused(tmp_path: Path, break_it: Callable[[Path], object]) -> None:
    write_folder(tmp_path, plain_config(), plain_tensors())
    break_it(tmp_path)
    with pytest.raises(InvalidAdapter):
        read_peft(tmp_path)


def test_every_field_of_pefts_config_is_classified_once() -> None:
    """A new PEFT with a new field fails here: decide whether it changes the function."""
    classes = [set(READ_FIELDS), set(IGNORED_FIELDS), set(REFUSED_FIELDS)]
    assert sum(map(len, classes)) == len(set.union(*classes))
    assert {field.name for field in fields(peft.LoraConfig)} == set.union(*classes)


def test_fields_that_peft_does_not_know_either_are_ignored(tmp_path: Path) -> None:
    config = plain_config(framework="x", use_new_thing=False, runtime_config={"ephemeral_gpu_offload": False})
    read_peft(write_folder(tmp_path, config, plain_tensors()))
