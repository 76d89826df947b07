"""The demo's base model: a Llama of 3.5 million parameters that knows restaurant sentences, and no task.

It sees E2E's references as plain text. All references of one meaning make one document, one reference a line: from the
second line on the facts are already told, so the model learns to carry them over, which is what the adapters build on.
The meaning representations are seen too, each a document of its own, so that their brackets have trained embeddings;
never beside a reference: pairing the two is the adapters' task.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters.data.example import Example
from adapters.training.byte_bpe import train_byte_bpe
from adapters.training.pretraining import PretrainSettings, pretrain
from adapters.training.small_llama import packed_blocks, small_llama

EOS = "<|end|>"
NEWLINE = "\n"


@dataclass(frozen=True)
class BaseRecipe:
    """What the base is made of; the defaults are the shipped one's."""

    vocab_size: int = 1536
    hidden_size: int = 256
    intermediate_size: int = 688
    layers: int = 4
    heads: int = 4
    context_tokens: int = 512
    block_tokens: int = 512
    batch_blocks: int = 8
    steps: int = 320
    warmup_share: float = 0.05
    matrix_learning_rate: float = 6e-3
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 1


def train_tokenizer(examples: Sequence[Example], vocab_size: int, context_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over references and meaning representations, with one special token: the end of a text."""
    # A completion follows its prompt after a space: count each sentence's first word with a space and without.
    refs = (text for e in examples for ref in e.completions for text in (ref, " " + ref))
    mrs = (text for e in examples for text in (e.prompt, " " + e.prompt))
    bpe = train_byte_bpe(itertools.chain(refs, mrs), vocab_size, [EOS])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS, model_max_length=context_tokens)


def documents(examples: Sequence[Example], rng: random.Random) -> Iterator[str]:
    """One epoch of texts in random order: per meaning its references shuffled, one a line; and the bare meanings."""
    texts = [NEWLINE.join(rng.sample(e.completions, len(e.completions))) for e in examples]
    texts += [e.prompt for e in examples]
    rng.shuffle(texts)
    return iter(texts)


def train_base(
    train: Sequence[Example], dev: Sequence[Example], recipe: BaseRecipe
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, float]:
    """Train tokenizer and model from nothing.

    Returns:
        the model in fp32, its tokenizer, and the loss per token on packed dev documents (nats).
    """
    tokenizer = train_tokenizer(train, recipe.vocab_size, recipe.context_tokens)
    model = small_llama(
        tokenizer,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        layers=recipe.layers,
        heads=recipe.heads,
        max_tokens=recipe.context_tokens,
        seed=recipe.seed,
    )
    stream = packed_blocks(partial(documents, train), tokenizer, recipe.block_tokens, recipe.seed)
    held_out = packed_blocks(partial(documents, dev), tokenizer, recipe.block_tokens, 0)
    dev_blocks = torch.stack(list(itertools.islice(held_out, 32)))
    batches = (torch.stack(list(itertools.islice(stream, recipe.batch_blocks))) for _ in itertools.count())
    settings = PretrainSettings(
        recipe.steps, recipe.warmup_share, recipe.matrix_learning_rate, recipe.learning_rate, recipe.weight_decay
    )
    pretrain(
        model,
        batches,
        lambda batch: model(input_ids=batch, labels=batch).loss,
        lambda: packed_loss(model, dev_blocks),
        settings,
    )
    return model, tokenizer, packed_loss(model, dev_blocks)


@torch.no_grad()
def packed_loss(model: LlamaForCausalLM, packed: Tensor) -> float:
    """Loss per token in nats over `packed` [blocks, block_tokens]."""
    model.eval()
    parts = torch.split(packed, 8)
    losses: list[float] = [model(input_ids=part, labels=part).loss.item() for part in parts]
    model.train()
    return sum(losses) / len(losses)


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write config, fp16 weights (safetensors), tokenizer and generation defaults (greedy, ends at eos)."""
    half: LlamaForCausalLM = model.half()
    half.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=96,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
