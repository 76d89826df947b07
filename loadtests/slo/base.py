"""The base model of the experiment: a Llama of 24 million parameters with random weights, on which rank takes time.

Large enough that HTTP is a small part of a step, small enough for two cores: 32 rows over 32 adapters of rank 64 take about
twice as long as at rank 4 (`python -m loadtests.rank_cost --set model=OUT/base` measures it).
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from service.demo import demo_adapter_folders

CONFIG: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def make_base(folder: Path) -> None:
    """Write it, with the demo's tokenizer, unless it is there."""
    if (folder / "config.json").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(demo_adapter_folders()[0].parent.parent / "base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **CONFIG)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def linear_shapes() -> dict[str, tuple[int, int]]:
    """(in, out) of every linear module of its blocks, by path."""
    config = LlamaConfig(vocab_size=8, **CONFIG)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    named = model.named_modules()
    return {
        path: (module.in_features, module.out_features)
        for path, module in named
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
