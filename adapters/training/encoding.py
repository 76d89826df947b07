"""From examples to token ids: what the model reads, and which tokens it is trained and measured on."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from adapters.data.example import Example, LabelledText
from adapters.errors import DataError

IGNORED = -100
"""Label of a token that the loss leaves out; transformers' convention."""


@dataclass(frozen=True)
class EncodedPair:
    """One prompt with one completion; the completion ends with the end-of-text token, unless it was cut.

    Attributes:
        is_text: plain text; the prompt is at most what the tokenizer puts before every text.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    is_text: bool = False


@dataclass(frozen=True)
class Shortened:
    """Pairs that keep a limit, and what it took.

    Attributes:
        cut: completions whose end was cut off.
        dropped: pairs that were left out, since their prompt leaves no room for a completion.
        divided: plain texts that were divided into several.
    """

    pairs: list[EncodedPair]
    cut: int = 0
    dropped: int = 0
    divided: int = 0


def encode(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> list[EncodedPair]:
    """Encode every completion of every example with its prompt, and end it.

    A server sees the prompt alone, so the prompt's tokens are those that it has alone. The completion's are those that
    follow them where both are tokenised together, since some tokenizers put a space before every text; where a token
    would straddle the seam, they are those that the completion has alone.

    Raises:
        DataError: the tokenizer has no end-of-text token, or a pair is longer than `max_tokens`; names the first.
            `shorten` is for those who would rather lose something.
    """
    pairs = []
    for example in examples:
        prompt = prompt_ids(example, tokenizer)
        for text, completion in zip(example.completions, _completions(example, prompt, tokenizer), strict=True):
            total = len(prompt) + len(completion)
            if max_tokens is not None and total > max_tokens:
                start = (example.prompt or text)[:80]
                raise DataError(f"{total} tokens in {start!r}; expected at most {max_tokens}")
            pairs.append(EncodedPair(prompt, completion, is_text=not example.prompt))
    return pairs


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The prompt as a model is given it, to train on and to answer."""
    return tuple(tokenizer(example.prompt, add_special_tokens=example.end is None, verbose=False).input_ids)


def _completions(example: Example, prompt: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, ...]]:
    is_templated = example.end is not None
    end = () if is_templated else (end_of_text(tokenizer),)
    texts = [text + (example.end or "") for text in example.completions]
    whole = [example.prompt + text for text in texts]
    # not verbose: it would warn of long texts, which are the caller's to refuse or to shorten
    together = tokenizer(whole, add_special_tokens=not is_templated, verbose=False).input_ids
    for text, ids in zip(texts, together, strict=True):
        follows = tuple(ids[: len(prompt)]) == prompt
        yield (*(ids[len(prompt) :] if follows else tokenizer(text, add_special_tokens=False, verbose=False).input_ids), *end)


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The end-of-text token. Raises DataError if the tokenizer has none."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError("the tokenizer has no end-of-text token; expected one, to teach the model where to stop")
    return tokenizer.eos_token_id


def shorten(pairs: Iterable[EncodedPair], max_tokens: int) -> Shortened:
    """Bring every pair to at most `max_tokens`.

    A long plain text is divided; each piece has the last token of the one before it as its prompt, so that every token is
    trained on once. Of any other long pair the completion's end is cut off, the end-of-text token with it.

    Raises:
        DataError: `max_tokens` is below 2, or no pair is left.
    """
    if max_tokens < 2:
        raise DataError(f"at most {max_tokens} tokens; expected at least 2, a token and one that it predicts")
    kept: list[EncodedPair] = []
    cut = dropped = divided = 0
    for pair in pairs:
        if len(pair.prompt) >= max_tokens:
            dropped += 1
        elif len(pair.prompt) + len(pair.completion) <= max_tokens:
            kept.append(pair)
        elif pair.is_text:
            divided += 1
            kept.extend(_divided(pair, max_tokens))
        else:
            cut += 1
            kept.append(EncodedPair(pair.prompt, pair.completion[: max_tokens - len(pair.prompt)]))
    if not kept:
        raise DataError(f"no prompt leaves room for a completion within {max_tokens} tokens; expected one at least")
    return Shortened(kept, cut, dropped, divided)


def _divided(pair: EncodedPair, max_tokens: int) -> Iterator[EncodedPair]:
    context, rest = pair.prompt, pair.completion
    while rest:
        room = max_tokens - len(context)
        piece, rest = rest[:room], rest[room:]
        yield EncodedPair(context, piece, is_text=True)
        context = piece[-1:]


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
        return {
            "input_ids": _padded([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": _padded([row["labels"] for row in rows], IGNORED),
            "attention_mask": _mask([row["input_ids"] for row in rows]),
        }


@dataclass(frozen=True)
class EncodedText:
    """A text, or a pair of texts, as an encoder reads it, with the tokenizer's special tokens.

    Attributes:
        label: the index of its class.
        token_type_ids: which text of the pair each token is of; None if the model doesn't ask for it.
        is_cut: whether the text lost its end. Not in the repr, by which a resumed run knows its data.
    """

    input_ids: tuple[int, ...]
    label: int
    token_type_ids: tuple[int, ...] | None = None
    is_cut: bool = field(default=False, repr=False)


def encode_labelled(items: Sequence[LabelledText], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[EncodedText]:
    """Encode texts, or pairs through the tokenizer's own template for pairs, of at most `max_tokens` each.

    What is longer loses its end; of a pair the longer text loses first.

    Raises:
        DataError: some are pairs and some aren't, or `max_tokens` leaves no room beside the special tokens.
    """
    seconds = [item.second for item in items if item.second is not None]
    if seconds and len(seconds) != len(items):
        raise DataError(f"{len(seconds)} of {len(items)} texts are pairs; expected all or none")
    least = tokenizer.num_special_tokens_to_add(pair=bool(seconds)) + (2 if seconds else 1)
    if max_tokens < least:
        raise DataError(f"at most {max_tokens} tokens; expected at least {least}, to hold something of every text")
    whole = _encoded_texts(items, tokenizer)
    long = [place for place, text in enumerate(whole) if len(text.input_ids) > max_tokens]
    cut = _encoded_texts([items[place] for place in long], tokenizer, truncation="longest_first", max_length=max_tokens)
    for place, text in zip(long, cut, strict=True):
        whole[place] = replace(text, is_cut=True)
    return whole


def _encoded_texts(items: Sequence[LabelledText], tokenizer: PreTrainedTokenizerBase, **limits: Any) -> list[EncodedText]:
    if not items:
        return []
    seconds = [item.second for item in items if item.second is not None]
    encoded = tokenizer([item.text for item in items], seconds or None, verbose=False, **limits)
    types = encoded.get("token_type_ids") or [None] * len(items)
    return [
        EncodedText(tuple(ids), item.label, None if kinds is None else tuple(kinds))
        for item, ids, kinds in zip(items, encoded.input_ids, types, strict=True)
    ]


class LabelledDataset(Dataset[dict[str, Any]]):
    """Encoded texts as transformers' Trainer takes them: `input_ids`, `labels`, and `token_type_ids` where there are any."""

    def __init__(self, texts: Sequence[EncodedText]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = self._texts[index]
        row: dict[str, Any] = {"input_ids": list(text.input_ids), "labels": text.label}
        return row if text.token_type_ids is None else row | {"token_type_ids": list(text.token_type_ids)}


@dataclass(frozen=True)
class LabelledPad:
    """Collate rows of a LabelledDataset to one length: [rows, longest], but `labels`, which are [rows]."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Tensors of `rows`, with the attention mask that hides the padding."""
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": torch.tensor([row["labels"] for row in rows]),
            "attention_mask": _mask([row["input_ids"] for row in rows]),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = _padded([row["token_type_ids"] for row in rows], 0)
        return batch


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])  # [rows, longest]


def _mask(rows: Sequence[Sequence[int]]) -> Tensor:
    return _padded([[1] * len(row) for row in rows], 0)


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
