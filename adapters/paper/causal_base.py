"""A causal base of our own: a Llama with tied embeddings and a byte-level BPE, on packed documents."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from adapters.paper.corpus import Corpus, Group
from adapters.paper.pretrained import BaseRecipe, Pretraining
from adapters.training.byte_bpe import train_byte_bpe
from adapters.training.small_llama import packed_blocks, small_llama

END = "<|end|>"


@dataclass(frozen=True, kw_only=True)
class CausalRecipe(BaseRecipe):
    """A Llama of this shape, from fresh weights; `max_tokens` are the positions that it has."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    max_tokens: int
    vocab_size: int = 4096

    def pretraining(self, corpus: Corpus) -> Pretraining[Tensor]:
        """Fresh weights and what trains them; a batch is [rows, row_tokens] token ids."""
        tokenizer = self._tokenizer(corpus)
        model = small_llama(
            tokenizer,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            layers=self.layers,
            heads=self.heads,
            max_tokens=self.max_tokens,
            seed=self.seed,
        )

        def batches(groups: Sequence[Group], seed: int) -> Iterator[Tensor]:
            blocks = packed_blocks(partial(_documents, groups), tokenizer, self.row_tokens, seed)
            while True:
                yield torch.stack(list(itertools.islice(blocks, self.batch_tokens // self.row_tokens)))

        def loss(batch: Tensor) -> Tensor:
            value: Tensor = model(input_ids=batch, labels=batch).loss
            return value

        return Pretraining(model, tokenizer, batches, loss)

    def _tokenizer(self, corpus: Corpus) -> PreTrainedTokenizerFast:
        # A completion follows its prompt after a space: count each text's first word with a space and without.
        texts = (text for group in corpus.groups for one in group for text in (one, " " + one))
        bpe = train_byte_bpe(texts, self.vocab_size, [END])
        return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=self.max_tokens)


def _documents(groups: Sequence[Group], rng: random.Random) -> Iterator[str]:
    """One epoch of documents: a group is one, a text a line.

    From the second line on the facts are told already, so the model learns to carry them over, which is what an adapter
    builds on.
    """
    return ("\n".join(rng.sample(group, len(group))) for group in rng.sample(groups, len(groups)))
