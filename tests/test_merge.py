"""Merged models: transformers loads what was written, and it computes what PEFT computes at that rank."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from adapters import IllegalRank, InvalidAdapter, export, read_peft
from adapters.adapter import Adapter, LowRank
from adapters.checkpoint import TENSORS_FILE
from adapters.config import AdapterConfig, AdapterKind
from adapters.errors import AdapterError
from adapters.merge import merge
from tests.checkpoints import edit_config, write_folder
from tests.engine_harness import character_tokenizer
from tests.tiny_models import (
    TINY_KINDS,
    random_peft_adapter,
    save_random_peft,
    some_tokens,
    stock_logits,
    tiny_config,
    tiny_model,
)

TOKENS = some_tokens(rows=2)


def base_of(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    tiny_model(kind).to(dtype).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def dylora_of(kind: str, folder: Path, **config: Any) -> Path:
    """A DyLoRA with the numbers of a random LoRA."""
    random_peft_adapter(kind, folder, **{"r": 4, "lora_alpha": 6, **config})
    edit_config(folder, dylora={"kind": "dylora"})
    return folder


def loaded(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_every_rank_is_what_peft_computes_from_its_export(kind: str, tmp_path: Path) -> None:
    base, adapter = base_of(kind, tmp_path / "base"), dylora_of(kind, tmp_path / "adapter")
    before = loaded(base)
    for rank in (1, 4):
        assert export(adapter, tmp_path / f"rank{rank}", rank=rank) == rank
        expected = stock_logits(kind, tmp_path / f"rank{rank}", TOKENS)
        out = tmp_path / f"merged{rank}"
        export(adapter, out, rank=rank, merge=True, model=base)
        found = loaded(out)
        close: dict[str, Any] = {"atol": 1e-4 * expected.abs().max().item(), "rtol": 1e-4}
        torch.testing.assert_close(logits(found), expected, **close)
        unmerged = PeftModel.from_pretrained(tiny_model(kind), str(tmp_path / f"rank{rank}"))
        torch.testing.assert_close(logits(unmerged.merge_and_unload()), logits(found), **close)
        assert found.config.tie_word_embeddings == before.config.tie_word_embeddings
        assert found.config.architectures == before.config.architectures
        assert not list(out.glob("*.bin"))


def test_the_tokenizer_comes_along_and_is_not_made_up(tmp_path: Path) -> None:
    adapter = random_peft_adapter("gpt2", tmp_path / "adapter")
    export(adapter, tmp_path / "out", merge=True, model=base_of("gpt2", tmp_path / "base"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == character_tokenizer().get_vocab()
    tiny_model("gpt2").save_pretrained(tmp_path / "alone")
    export(adapter, tmp_path / "out2", merge=True, model=tmp_path / "alone")
    assert not list((tmp_path / "out2").glob("*token*"))


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
    ],
)
def test_weights_are_rounded_once_to_the_dtype_asked_for(
    stored: torch.dtype, asked: str, written: torch.dtype, tmp_path: Path
) -> None:
    base, adapter = base_of("qwen2", tmp_path / "base", stored), dylora_of("qwen2", tmp_path / "adapter")
    export(adapter, tmp_path / "out", rank=2, merge=True, model=base, dtype=asked)
    exact = tiny_model("qwen2").to(stored).float()
    merge(exact, read_peft(adapter), 2)
    found = loaded(tmp_path / "out", dtype="auto")
    assert found.dtype is written
    for name, parameter in exact.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter.to(written)), name


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_embeddings_part_where_one_is_adapted(target: str, tmp_path: Path) -> None:
    base = base_of("qwen2", tmp_path / "base")
    adapter = random_peft_adapter("qwen2", tmp_path / "adapter", target_modules=[target, "q_proj"])
    export(adapter, tmp_path / "out", merge=True, model=base)
    found = loaded(tmp_path / "out")
    assert found.config.tie_word_embeddings is False
    ends = {"embed_tokens": found.get_input_embeddings(), "lm_head": found.get_output_embeddings()}
    for name, module in ends.items():
        same = torch.equal(module.weight, tiny_model("qwen2").get_input_embeddings().get_parameter("weight"))
        assert same == (name != target)


def test_tied_embeddings_stay_tied_where_the_base_itself_was_changed(tmp_path: Path) -> None:
    """PEFT's `save_embedding_layers`: see test_checkpoint.py."""
    folder = random_peft_adapter("qwen2", tmp_path / "adapter")
    weight = tiny_model("qwen2").get_input_embeddings().get_parameter("weight")
    tensors = load_file(folder / TENSORS_FILE) | {"base_model.model.model.embed_tokens.weight": 0.5 * weight.detach()}
    write_folder(folder, json.loads((folder / "adapter_config.json").read_text()), tensors)
    export(folder, tmp_path / "out", merge=True, model=base_of("qwen2", tmp_path / "base"))
    found = loaded(tmp_path / "out")
    assert found.config.tie_word_embeddings is True
    assert torch.equal(found.get_output_embeddings().get_parameter("weight"), 0.5 * weight)
    torch.testing.assert_close(logits(found), stock_logits("qwen2", folder, TOKENS), atol=1e-3, rtol=1e-4)


def test_a_model_without_a_head_and_an_encoder_decoder_are_merged(tmp_path: Path) -> None:
    t5 = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    cases: list[tuple[PreTrainedModel, LoraConfig, type[Any]]] = [
        (
            LlamaModel(tiny_config("llama")),
            LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="FEATURE_EXTRACTION"),
            AutoModel,
        ),
        (
            T5ForConditionalGeneration(t5),
            LoraConfig(r=4, target_modules=["q", "v", "wi"], task_type="SEQ_2_SEQ_LM"),
            T5ForConditionalGeneration,
        ),
    ]
    for number, (model, config, loader) in enumerate(cases):
        base, adapter, out = (tmp_path / f"{name}{number}" for name in ("base", "adapter", "out"))
        model.save_pretrained(base)
        save_random_peft(model, config, adapter)
        export(adapter, out, merge=True, model=base)
        wrapped = PeftModel.from_pretrained(loader.from_pretrained(base), str(adapter)).eval()
        found = loader.from_pretrained(out).eval()
        tokens = {"decoder_input_ids": TOKENS} if number else {}
        with torch.no_grad():
            expected, got = wrapped(input_ids=TOKENS, **tokens)[0], found(input_ids=TOKENS, **tokens)[0]
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


def classifier_adapter(tmp_path: Path) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(base_of("llama", tmp_path / "base"), num_labels=3)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    return save_random_peft(model, config, tmp_path / "adapter")


def test_a_base_s_head_for_other_classes_makes_room_for_the_adapter_s(tmp_path: Path) -> None:
    adapter = classifier_adapter(tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    load(tmp_path / "base", num_labels=5).save_pretrained(tmp_path / "five")
    export(adapter, tmp_path / "out", merge=True, model=tmp_path / "five")
    wrapped = PeftModel.from_pretrained(load(tmp_path / "base", num_labels=3), str(adapter)).eval()
    with torch.no_grad():
        expected, got = wrapped(TOKENS[:1]).logits, load(tmp_path / "out").eval()(TOKENS[:1]).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def without_head(tmp_path: Path) -> tuple[Path, Path]:
    adapter = classifier_adapter(tmp_path)
    tensors = {name: tensor for name, tensor in load_file(adapter / TENSORS_FILE).items() if "score" not in name}
    save_file(tensors, str(adapter / TENSORS_FILE), metadata={"format": "pt"})
    return adapter, tmp_path / "base"


def quantised(tmp_path: Path) -> tuple[Path, Path]:
    base = base_of("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    return random_peft_adapter("llama", tmp_path / "adapter"), base


def pickled(tmp_path: Path) -> tuple[Path, Path]:
    base = base_of("llama", tmp_path / "base")
    (base / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), base / "pytorch_model.bin")
    return random_peft_adapter("llama", tmp_path / "adapter"), base


def resized(tmp_path: Path) -> tuple[Path, Path]:
    adapter = random_peft_adapter("llama", tmp_path / "adapter")
    tensors = load_file(adapter / TENSORS_FILE) | {"base_model.model.model.embed_tokens.weight": torch.ones(98, 32)}
    save_file(tensors, str(adapter / TENSORS_FILE), metadata={"format": "pt"})
    return adapter, base_of("llama", tmp_path / "base")


def of_another_model(tmp_path: Path) -> tuple[Path, Path]:
    return random_peft_adapter("gpt2", tmp_path / "adapter"), base_of("llama", tmp_path / "base")


def of_another_size(tmp_path: Path) -> tuple[Path, Path]:
    config = tiny_config("llama")
    config.intermediate_size = 64
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return random_peft_adapter("llama", tmp_path / "adapter"), tmp_path / "base"


def with_lora_bias(tmp_path: Path) -> tuple[Path, Path]:
    return random_peft_adapter("llama", tmp_path / "adapter", lora_bias=True), base_of("llama", tmp_path / "base")


def of_no_model(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "base").mkdir()
    return random_peft_adapter("llama", tmp_path / "adapter"), tmp_path / "base"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (without_head, r"score.weight: neither the base model .* nor the adapter has it trained"),
        (quantised, r"is quantised, and what is rounded to a few bits takes no small update"),
        (pickled, r"can't be loaded: .*safetensors"),
        (resized, r"embed_tokens.weight: has shape \[98, 32\], the base model \[96, 32\] \(was its vocabulary resized\?"),
        (of_another_model, r"transformer.h.0.attn.c_attn: the base model has no such module.*h.1.attn.c_attn"),
        (of_another_size, r"0.mlp.down_proj: made for out, in = \(32, 48\), the base model has \(32, 64\).*1.mlp.up_proj"),
        (with_lora_bias, r"q_proj.bias: the base model has no such parameter"),
        (of_no_model, r"can't be loaded"),
    ],
)
def test_what_can_not_be_merged_is_refused_and_leaves_nothing_behind(
    make: Callable[[Path], tuple[Path, Path]], reason: str, tmp_path: Path
) -> None:
    adapter, base = make(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(AdapterError, match=reason):
        export(adapter, tmp_path / "out", merge=True, model=base)
    assert set(tmp_path.iterdir()) == before


def test_a_number_beyond_the_dtype_is_refused_by_name(tmp_path: Path) -> None:
    base, adapter = base_of("llama", tmp_path / "base"), random_peft_adapter("llama", tmp_path / "adapter", std=1e3)
    with pytest.raises(AdapterError, match=r"_proj\.weight: too large for float16; choose another dtype"):
        export(adapter, tmp_path / "out", merge=True, model=base, dtype="float16")


def test_a_merge_in_memory_starts_from_a_model_that_fits() -> None:
    layers = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Conv2d(1, 1, 1)})
    factors = LowRank(torch.ones(2, 3), torch.ones(2, 2))
    adapter = Adapter(AdapterConfig(AdapterKind.DYLORA, 2, 4.0), {"a": factors})
    before = layers["a"].get_parameter("weight").detach().clone()
    with pytest.raises(InvalidAdapter, match="b: the base model's Conv2d can't take this"):
        merge(layers, replace(adapter, modules={"a": factors, "b": factors}), 1)
    with pytest.raises(IllegalRank):
        merge(layers, adapter, 3)
    assert torch.equal(layers["a"].get_parameter("weight"), before)
    merge(layers, adapter, 1)
    torch.testing.assert_close(layers["a"].get_parameter("weight"), before + 4.0)
