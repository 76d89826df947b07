"""Tiny random causal language models of every supported architecture, and stock PEFT adapters for them.

The weights are drawn wide (standard deviation 0.3), so that greedy continuations vary from prompt to prompt and near-ties
between the two best tokens are rare: a test that compares tokens then compares numbers, not luck.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB = 96
HIDDEN = 32
LAYERS = 2
POSITIONS = 256
STD = 0.3

_ROPE_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": STD,
}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_ROPE_DECODER, "tie_word_embeddings": False},
    "qwen2": {**_ROPE_DECODER, "tie_word_embeddings": True},
    "mistral": {**_ROPE_DECODER, "sliding_window": 8, "tie_word_embeddings": False},
    "gemma": {**_ROPE_DECODER, "head_dim": 8, "tie_word_embeddings": False},
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": POSITIONS,
        "initializer_range": STD,
    },
    "gpt_neox": {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "initializer_range": STD,
    },
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "init_std": STD,
    },
}

TINY_KINDS = tuple(_CONFIGS)
"""Every kind that `tiny_model` builds. Mistral's window is 8 tokens; GPT-2 has Conv1D; Qwen2 and OPT have biases."""

LINEAR_TARGETS: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "mistral": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gemma": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
"""Every linear layer inside the blocks, by the names that PEFT's `target_modules` takes."""


def tiny_config(kind: str) -> PretrainedConfig:
    """The configuration of `tiny_model(kind)`."""
    # Special tokens inside the vocabulary, and none that ends a generation by chance.
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
    config: PretrainedConfig = CONFIG_MAPPING[kind](**_CONFIGS[kind], **special)
    return config


def tiny_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model of two layers, hidden size 32, vocabulary 96; float32, in eval mode, without gradients.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
        # Biases and norm weights start as zeros and ones; move them, so that a lost or doubled one shows.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            assert torch.isfinite(parameter).all(), name
    model.eval()
    model.requires_grad_(False)
    return model


def random_peft_adapter(
    kind: str,
    folder: Path,
    *,
    r: int = 4,
    seed: int = 0,
    target_modules: Sequence[str] | str | None = None,
    dtype: torch.dtype = torch.float32,
    std: float = 0.2,
    **lora_config: Any,
) -> Path:
    """Write a random adapter for `tiny_model(kind)` with stock PEFT, and return its folder.

    Every tensor that PEFT would have trained is filled with noise: A, B, LoRA's own bias, base biases and saved modules.

    Args:
        kind: one of TINY_KINDS.
        folder: where `adapter_config.json` and `adapter_model.safetensors` go; made if absent.
        r: LoRA's rank.
        seed: of the fill.
        target_modules: PEFT's; every linear layer of the blocks unless given.
        dtype: of the stored tensors.
        std: standard deviation of the factors. Other tensors move by as much around their value in the base.
        **lora_config: any other field of peft.LoraConfig.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules or LINEAR_TARGETS[kind])
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "fan_in_fan_out": kind == "gpt2", **lora_config}
    return save_random_peft(
        tiny_model(kind), LoraConfig(r=r, target_modules=targets, **settings), folder, seed=seed, dtype=dtype, std=std
    )


def save_random_peft(
    model: PreTrainedModel,
    config: LoraConfig,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    std: float = 0.2,
) -> Path:
    """The same for any model and any of PEFT's configs. The model is changed."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on embeddings and layouts is not what a test is about
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = std * torch.randn_like(parameter)
            parameter.data = noise if ".lora_" in name else parameter.data + noise
        wrapped.to(dtype).save_pretrained(str(folder))
    return folder


def stock_logits(kind: str, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Stock PEFT's logits with the adapter in `folder` on `tiny_model(kind)`; [rows, length] to [rows, length, VOCAB]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of our own block in the config, which it ignores
        model = PeftModel.from_pretrained(tiny_model(kind), str(folder)).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


def some_tokens(rows: int = 3, length: int = 10, seed: int = 0) -> torch.Tensor:
    """Random tokens [rows, length] of the tiny models' vocabulary."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
