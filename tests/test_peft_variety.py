"""PEFT's own variety: files that stock PEFT writes are read, shown, nested, exported and merged with the function they had,
or refused with the reason.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from adapters import convert, export, inspect
from adapters.checkpoint import CONFIG_FILE
from adapters.errors import InvalidAdapter
from tests.checkpoints import edit_config, rename_keys
from tests.engine_harness import character_tokenizer
from tests.tiny_models import LINEAR_TARGETS, POSITIONS, STD, VOCAB, save_random_peft, some_tokens, tiny_model

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A checkpoint by stock PEFT.

    Attributes:
        base: a kind of `tiny_model`, "roberta", or either with "+head" for three labels.
        config: fields of LoraConfig; r is 4, and all linear layers are targets, unless given.
        dtype: of the stored tensors.
        change: what happened to the files in the wild.
        refused: a part of the reason, if it must be refused.
    """

    base: str
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    change: Change = lambda folder: None
    refused: str = ""


def renamed(**pieces: str) -> Change:
    return lambda folder: rename_keys(folder, {old.replace("__", "."): new for old, new in pieces.items()})


def only_fields(*names: str) -> Change:
    """A config as PEFT wrote it when it had few fields."""

    def change(folder: Path) -> None:
        path = folder / CONFIG_FILE
        content = json.loads(path.read_text())
        path.write_text(json.dumps({name: content[name] for name in names}))

    return change


def with_fields(**fields: Any) -> Change:
    return lambda folder: edit_config(folder, **fields)


OLD_FIELDS = ("peft_type", "r", "lora_alpha", "target_modules", "bias", "fan_in_fan_out", "task_type")
ATTENTION_ONLY = {"target_modules": ["query", "value"]}

CASES: dict[str, Case] = {
    "plain": Case("llama", {"lora_alpha": 6}),
    "rsLoRA": Case("llama", {"use_rslora": True, "lora_alpha": 5}),
    "rank_pattern": Case("llama", {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}}),
    "rank_pattern that is a regular expression": Case("llama", {"rank_pattern": {r"model\.layers\.\d\.mlp\..*": 2}}),
    "rank_pattern and rsLoRA": Case("llama", {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}, "use_rslora": True}),
    "alpha_pattern": Case("llama", {"alpha_pattern": {"v_proj": 3, "layers.0.mlp.up_proj": 16}}),
    "alpha_pattern that is a regular expression": Case(
        "llama", {"alpha_pattern": {r".*\.[qk]_proj": 3}}, refused="alpha_pattern: '.*\\\\.[qk]_proj' is a regular expression"
    ),
    "lora_bias": Case("opt", {"lora_bias": True, "lora_alpha": 6}),
    "bias all": Case("opt", {"bias": "all"}),
    "bias lora_only": Case("opt", {"bias": "lora_only", "target_modules": ["q_proj", "fc1"]}),
    "bias all in Conv1D": Case("gpt2", {"bias": "all"}),
    "modules_to_save": Case("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "modules_to_save of a tied embedding": Case("qwen2", {"modules_to_save": ["embed_tokens"]}),
    "modules_to_save of a tied output": Case("qwen2", {"modules_to_save": ["lm_head"]}),
    "embedding": Case("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding": Case("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding in Conv1D's model": Case("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "scaled embedding": Case("gemma", {"target_modules": ["embed_tokens", "q_proj"]}),
    "output layer": Case("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "tied output layer": Case("gpt2", {"target_modules": ["lm_head", "c_attn"], "fan_in_fan_out": False}),
    "Conv1D": Case("gpt2", {"fan_in_fan_out": True, "lora_alpha": 6}),
    "fan_in_fan_out where nothing is": Case("llama", {"fan_in_fan_out": True}),
    "fused projections": Case("gpt_neox", {"target_modules": ["query_key_value", "dense"]}),
    "float16": Case("llama", {"lora_alpha": 6}, torch.float16),
    "bfloat16": Case("llama", {"lora_alpha": 6, "modules_to_save": ["lm_head"]}, torch.bfloat16),
    "adapter's name left in": Case("llama", change=renamed(__weight=".default.weight")),
    "no prefix": Case("llama", change=renamed(base_model__model__="")),
    "prefix of data-parallel training": Case("llama", change=renamed(base_model__model__="module.base_model.model.")),
    "encoder's head": Case("roberta+head", {"task_type": "SEQ_CLS", **ATTENTION_ONLY}),
    "encoder's head, listed": Case(
        "roberta+head", {**ATTENTION_ONLY, "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    ),
    "decoder's head": Case("llama+head", {"task_type": "SEQ_CLS"}),
    "masked language model": Case("roberta", {"task_type": None, **ATTENTION_ONLY}),
    "exclude_modules": Case("llama", {"target_modules": "all-linear", "exclude_modules": ["lm_head", "down_proj"]}),
    "exclude_modules, an expression": Case("llama", {"exclude_modules": r".*\.1\..*"}),
    "target_modules, an expression": Case("mistral", {"target_modules": r".*\.(q|v)_proj"}),
    "all-linear": Case("gpt2", {"target_modules": "all-linear"}),
    "layers_to_transform": Case("gemma", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "initialised another way": Case("llama", {"init_lora_weights": "orthogonal", "lora_dropout": 0.1}),
    "the first PEFT's config": Case("llama", {"lora_alpha": 6}, change=only_fields(*OLD_FIELDS)),
    "fields of the past": Case("llama", change=with_fields(enable_lora=None, merge_weights=False, rank_pattern=None)),
    "fields of the future": Case("llama", change=with_fields(peft_version="9.0", not_yet_known=None)),
    "trainable_token_indices": Case(
        "llama", {"trainable_token_indices": [5, 6]}, refused="trainable_token_indices is set: trained token embeddings"
    ),
    "DoRA": Case("llama", {"use_dora": True}, refused="use_dora is set: DoRA is not served yet"),
    "PiSSA": Case("llama", {"init_lora_weights": "pissa"}, refused="which changed the base model's weights"),
    "target_parameters": Case(
        "llama", {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}, refused="target_parameters is set"
    ),
}

ACCEPTED = [name for name, case in CASES.items() if not case.refused]
REFUSED = [name for name, case in CASES.items() if case.refused]


@dataclass(frozen=True)
class Bases:
    """Base models in folders, as a person has them."""

    root: Path

    def folder(self, base: str) -> Path:
        """What `export --model` is given: with a head of three labels to come, a base without any."""
        kind, _, _ = base.partition("+")
        folder = self.root / kind
        if not folder.exists():
            new_model(kind).save_pretrained(folder)
            character_tokenizer().save_pretrained(folder)
        return folder

    def load(self, base: str) -> PreTrainedModel:
        """The model that PEFT wraps. A new head has the same random numbers every time."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(1)
            return load(base, self.folder(base), **({"num_labels": 3} if base.endswith("+head") else {}))


def load(base: str, folder: Path, **options: Any) -> PreTrainedModel:
    """What lies in a folder, as the class that `base` means."""
    loader: Any = RobertaForMaskedLM if base == "roberta" else AutoModelForCausalLM
    if base.endswith("+head"):
        loader = AutoModelForSequenceClassification
    model: PreTrainedModel = loader.from_pretrained(folder, **options).eval()
    return model


def new_model(kind: str) -> PreTrainedModel:
    if kind != "roberta":
        return tiny_model(kind)
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return RobertaForMaskedLM(
        RobertaConfig(vocab_size=VOCAB, max_position_embeddings=POSITIONS, initializer_range=STD, pad_token_id=1, **fields)
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def write(case: Case, bases: Bases, folder: Path) -> Path:
    kind, _, _ = case.base.partition("+")
    defaults = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": list(LINEAR_TARGETS.get(kind, ()))}
    if kind == "gpt2":
        defaults["fan_in_fan_out"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_random_peft(bases.load(case.base), LoraConfig(**{**defaults, **case.config}), folder, dtype=case.dtype)
    return folder


def logits(model: PreTrainedModel) -> Tensor:
    tokens = some_tokens(rows=1)
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def peft_logits(case: Case, bases: Bases, folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(bases.load(case.base), str(folder)).eval())


@pytest.mark.parametrize("name", ACCEPTED)
def test_it_keeps_its_function_in_every_form(name: str, bases: Bases, tmp_path: Path) -> None:
    case = CASES[name]
    original = write(case, bases, tmp_path / "original")
    expected = peft_logits(case, bases, original)
    assert (expected - logits(bases.load(case.base))).abs().max() > 0.1  # the adapter does something
    case.change(original)
    close: dict[str, Any] = {"atol": 1e-4 * expected.abs().max().item() + 1e-4, "rtol": 1e-4}

    facts = inspect(original)
    assert facts.config.r_max == max(module.rank for module in facts.modules)
    assert facts.ranks[-1].energy == pytest.approx(1)

    export(original, tmp_path / "exported")
    torch.testing.assert_close(peft_logits(case, bases, tmp_path / "exported"), expected, **close)
    export(original, tmp_path / "merged", merge=True, model=bases.folder(case.base))
    torch.testing.assert_close(logits(load(case.base, tmp_path / "merged")), expected, **close)

    nested = convert(original, tmp_path / "nested")
    torch.testing.assert_close(peft_logits(case, bases, tmp_path / "nested"), expected, **close)
    assert {module.path for module in facts.modules} == set(nested.modules)
    export(tmp_path / "nested", tmp_path / "rank2", rank=2)
    at_rank = peft_logits(case, bases, tmp_path / "rank2")
    assert (at_rank - expected).abs().max() > 1e-3
    export(tmp_path / "nested", tmp_path / "merged2", rank=2, merge=True, model=bases.folder(case.base))
    torch.testing.assert_close(logits(load(case.base, tmp_path / "merged2")), at_rank, **close)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_reason(name: str, bases: Bases, tmp_path: Path) -> None:
    case = CASES[name]
    original = write(case, bases, tmp_path / "original")
    for command in (inspect, lambda folder: convert(folder, tmp_path / "out"), lambda folder: export(folder, tmp_path / "out")):
        with pytest.raises(InvalidAdapter) as caught:
            command(original)
        assert case.refused in str(caught.value)
    assert not (tmp_path / "out").exists()
