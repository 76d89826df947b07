"""Encoded data as transformers' Trainer takes it, of either task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor
from torch.utils.data import Dataset

from adapters.training.encoding import EncodedPair, EncodedText, LabelledDataset, LabelledPad, PairDataset, RightPad

Rows = Sequence[EncodedPair] | Sequence[EncodedText]
"""Pairs for a causal language model, or labelled texts for a classifier."""


@dataclass(frozen=True)
class TrainingData:
    """Rows with all that Trainer asks for.

    Attributes:
        dataset: the rows.
        collate: makes a batch of some of them.
        lengths: tokens of each row.
    """

    dataset: Dataset[dict[str, Any]]
    collate: Callable[[Any], dict[str, Tensor]]
    lengths: tuple[int, ...]


def training_data(rows: Rows, pad_token_id: int) -> TrainingData:
    """The rows, to be padded with `pad_token_id`."""
    if are_texts(rows):
        lengths = tuple(len(text.input_ids) for text in rows)
        return TrainingData(LabelledDataset(rows), LabelledPad(pad_token_id), lengths)
    pairs: Sequence[EncodedPair] = rows  # type: ignore[assignment]
    return TrainingData(PairDataset(pairs), RightPad(pad_token_id), tuple(len(p.prompt) + len(p.completion) for p in pairs))


def are_texts(rows: Rows) -> TypeGuard[Sequence[EncodedText]]:
    """Whether the rows are a classifier's."""
    return bool(rows) and isinstance(rows[0], EncodedText)
