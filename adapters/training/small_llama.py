"""What the small bases of our own are: a Llama with tied embeddings, trained on packed documents."""

import random
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def small_llama(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    max_tokens: int,
    seed: int,
) -> LlamaForCausalLM:
    """A Llama with fresh weights in fp32, its embeddings tied; the tokenizer's ends are its own."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=max_tokens,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def packed_blocks(
    epoch: Callable[[random.Random], Iterable[str]], tokenizer: PreTrainedTokenizerFast, block_tokens: int, seed: int
) -> Iterator[Tensor]:
    """Endless blocks, [block_tokens] each, of whole documents one after the other, each closed by the tokenizer's end.

    Args:
        epoch: one epoch's documents, in an order that it draws.
    """
    rng = random.Random(seed)
    buffer: list[int] = []
    while True:
        for text in epoch(rng):
            buffer += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
            while len(buffer) >= block_tokens:
                yield torch.tensor(buffer[:block_tokens])
                buffer = buffer[block_tokens:]
