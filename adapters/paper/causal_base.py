"""A causal base of our own: a Llama with tied embeddings and a byte-level BPE, on packed documents."""

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from adapters.paper.corpus import Corpus, Group
from adapters.paper.pretrained import BaseRecipe, Pretraining
from adapters.training.byte_bpe import train_byte_bpe
from adapters.training.small_llama import packed_blocks, small_llama

END = "<|end|>"


def causal_pretraining(corpus: Corpus, recipe: BaseRecipe) -> Pretraining[Tensor]:
    """Fresh weights and what trains them; a batch is [rows, block_tokens] token ids."""
    tokenizer = _tokenizer(corpus, recipe)
    model = small_llama(
        tokenizer,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        layers=recipe.layers,
        heads=recipe.heads,
        max_tokens=recipe.max_tokens,
        seed=recipe.seed,
    )

    def batches(groups: Sequence[Group], seed: int) -> Iterator[Tensor]:
        blocks = packed_blocks(partial(_documents, groups), tokenizer, recipe.row_tokens, seed)
        while True:
            yield torch.stack(list(itertools.islice(blocks, recipe.batch_tokens // recipe.row_tokens)))

    def loss(batch: Tensor) -> Tensor:
        value: Tensor = model(input_ids=batch, labels=batch).loss
        return value

    return Pretraining(model, tokenizer, batches, loss)


def _tokenizer(corpus: Corpus, recipe: BaseRecipe) -> PreTrainedTokenizerFast:
    # A completion follows its prompt after a space: count each text's first word with a space and without.
    texts = (text for group in corpus.groups for one in group for text in (one, " " + one))
    bpe = train_byte_bpe(texts, recipe.vocab_size, [END])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=recipe.max_tokens)


def _documents(groups: Sequence[Group], rng: random.Random) -> Iterator[str]:
    """One epoch of documents: a group is one, a text a line.

    From the second line on the facts are told already, so the model learns to carry them over, which is what an adapter
    builds on.
    """
    return ("\n".join(rng.sample(group, len(group))) for group in rng.sample(groups, len(groups)))
