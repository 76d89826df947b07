"""From examples to token ids: what the model reads, and which tokens it is trained and measured on."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from adapters.data.example import Example
from adapters.errors import DataError

IGNORED = -100
"""Label of a token that the loss leaves out; transformers' convention."""


@dataclass(frozen=True)
class EncodedPair:
    """One prompt with one completion; the completion ends with the end-of-text token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


def encode(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> list[EncodedPair]:
    """Encode every completion of every example with its prompt.

    The two sides are tokenised apart: a server sees the prompt alone, so no token may straddle the seam.

    Raises:
        DataError: the tokenizer has no end-of-text token, or a pair is longer than `max_tokens`; names the first.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError("the tokenizer has no end-of-text token; expected one, to teach the model where to stop")
    pairs = []
    for example in examples:
        prompt = tuple(tokenizer(example.prompt).input_ids)
        for text in example.completions:
            completion = (*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id)
            if max_tokens is not None and len(prompt) + len(completion) > max_tokens:
                total = len(prompt) + len(completion)
                raise DataError(f"{total} tokens in {example.prompt[:80]!r}; expected at most {max_tokens}")
            pairs.append(EncodedPair(prompt, completion))
    return pairs


class PairDataset(Dataset[dict[str, list[int]]]):
    """Encoded pairs as transformers' Trainer takes them: `input_ids`, and `labels` that ignore the prompt."""

    def __init__(self, pairs: Sequence[EncodedPair]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        pair = self._pairs[index]
        return {
            "input_ids": [*pair.prompt, *pair.completion],
            "labels": [IGNORED] * len(pair.prompt) + list(pair.completion),
        }


@dataclass(frozen=True)
class RightPad:
    """Collate rows to one length: each tensor comes out as [rows, longest]."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Tensors of `rows`, with the attention mask that hides the padding."""
        lengths = [len(row["input_ids"]) for row in rows]
        longest = max(lengths)

        def padded(key: str, value: int) -> Tensor:
            return torch.tensor([[*row[key], *[value] * (longest - len(row[key]))] for row in rows])

        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", IGNORED),
            "attention_mask": torch.tensor([[1] * n + [0] * (longest - n) for n in lengths]),
        }


class LikeLengths(Sampler[int]):
    """Random order in which each run of `batch_size` indices has like lengths, so that little is padded.

    Trainer's own grouping by length runs from long batches to short ones, fifty at a time: a short training then ends
    on whatever length comes last, and writes sentences of that length. Here the batches are shuffled as well.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pool_batches: int = 32) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._pool = batch_size * pool_batches
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; accelerate calls it, also when a run is resumed."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"order {self._seed} {self._epoch}")
        order = list(range(len(self._lengths)))
        rng.shuffle(order)
        pools = [sorted(order[i : i + self._pool], key=self._lengths.__getitem__) for i in range(0, len(order), self._pool)]
        by_length = [index for pool in pools for index in pool]
        size = self._batch_size
        whole = len(by_length) // size * size  # a short last batch has to stay the last
        batches = [by_length[i : i + size] for i in range(0, whole, size)]
        rng.shuffle(batches)
        yield from (index for batch in [*batches, by_length[whole:]] for index in batch)
