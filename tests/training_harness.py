"""What tests of training share: model folders with a tokenizer, data files, and adapters compared to the bit."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM, PreTrainedTokenizerFast

from adapters.adapter import Adapter
from adapters.training.encoding import EncodedPair
from tests.tiny_models import HIDDEN, LAYERS, POSITIONS, STD, VOCAB, tiny_model

WORDS = 20
"""Words that data files are made of: "w0" and so on, each one token."""


def copying_pairs(count: int = 32) -> list[EncodedPair]:
    """Prompts of four tokens out of 20, to be repeated and ended."""
    rng = random.Random(0)
    prompts = [tuple(rng.choices(range(2, 22), k=4)) for _ in range(count)]
    return [EncodedPair(prompt, (*prompt, 1)) for prompt in prompts]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, within the tiny models' vocabulary."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCAB - 3))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **special)


def model_folder(folder: Path, kind: str = "llama") -> Path:
    """A causal model of tests.tiny_models, or a masked one ("bert", "roberta") as an encoder is published."""
    model = masked_model(kind) if kind in ("bert", "roberta") else tiny_model(kind)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def masked_model(kind: str) -> Any:
    config = CONFIG_MAPPING[kind](
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        initializer_range=STD,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForMaskedLM.from_config(config, dtype=torch.float32)


def write_pairs(file: Path, count: int = 32) -> Path:
    """Prompts of four words, to be repeated."""
    rng = random.Random(0)
    prompts = [" ".join(f"w{rng.randrange(WORDS)}" for _ in range(4)) for _ in range(count)]
    return write_lines(file, [{"prompt": prompt, "completion": " " + prompt} for prompt in prompts])


def write_labelled(file: Path, count: int = 32) -> Path:
    """Texts of four words, labelled by whether these are of the lower or the upper half."""
    rng, half = random.Random(0), WORDS // 2
    texts = [" ".join(f"w{rng.randrange(half) + half * (i % 2)}" for _ in range(4)) for i in range(count)]
    return write_lines(file, [{"text": text, "label": ("lower", "upper")[i % 2]} for i, text in enumerate(texts)])


def write_lines(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a finished adapter."""
    tensors: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return tensors


def are_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether both hold the same tensors, to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def are_equal_adapters(one: Adapter, other: Adapter) -> bool:
    factors = [{f"{p}.{i}": t for p, m in a.modules.items() for i, t in enumerate((m.a, m.b))} for a in (one, other)]
    return are_equal(factors[0], factors[1])
