"""The work that every engine is measured on: a Llama of 100M parameters with random weights, and LoRA adapters for it.

Speed does not depend on the values of weights. The adapters are PEFT checkpoints over all seven linear layers of every
block; row i of a mixed batch uses adapter i mod 8, so that neighbours differ in adapter and in rank.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from adapters.adapter import Adapter, LowRank
from adapters.checkpoint import write_peft
from adapters.config import AdapterConfig, AdapterKind

BATCHES = (1, 8, 16, 32)
PROMPT_TOKENS = 32
NEW_TOKENS = 48
RANKS = (2, 4, 8, 16, 2, 4, 8, 16)
ALPHA = 16.0
CONFIG: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


SIZES: dict[str, dict[str, Any]] = {
    "100m": CONFIG,
    "1b": {
        **CONFIG,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
"""What a GPU needs a larger model for: below, its steps take as long as their launches."""


def load_base(folder: Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """The workload's model."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, dtype))
    moved: PreTrainedModel = model.to(device)
    return moved


def make_workload(folder: Path, config: Mapping[str, Any] = CONFIG) -> None:
    """Write `base`, with a tokenizer, and `adapter0` to `adapter7` into a folder."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.save_pretrained(folder / "base")
    number_tokenizer(config["vocab_size"]).save_pretrained(folder / "base")
    for number, rank in enumerate(RANKS):
        write_peft(random_lora(model, rank, seed=number), folder / f"adapter{number}")


def random_lora(model: PreTrainedModel, rank: int, *, seed: int) -> Adapter:
    """A plain LoRA of noise over every linear layer of a model's blocks."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        path: LowRank(
            0.02 * torch.randn(rank, module.in_features, generator=generator),
            0.02 * torch.randn(module.out_features, rank, generator=generator),
        )
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
    return Adapter(AdapterConfig(AdapterKind.LORA, rank, ALPHA), factors)


def prompts(batch: int, *, tokens: int = PROMPT_TOKENS) -> list[list[int]]:
    """Random prompts, the same for every engine."""
    rng = random.Random(batch)
    return [[rng.randint(5, 30000) for _ in range(tokens)] for _ in range(batch)]


def adapter_of(row: int) -> int:
    """Which adapter a row of a mixed batch uses."""
    return row % len(RANKS)


def number_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of `size` tokens: the 256 bytes, then numbers. Text costs what it costs a real model."""
    alphabet: Sequence[str] = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    vocabulary |= {f"Ġ{i}": i for i in range(len(alphabet), size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
