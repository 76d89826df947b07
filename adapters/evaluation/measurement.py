"""Measuring at one rank after the other: the statistics of every example under every metric."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from adapters.evaluation.metric import Metric
from adapters.evaluation.resampling import Array


class EvaluationSet(Protocol):
    """Data to measure on, encoded once for all ranks.

    Attributes:
        metrics: what is measured; the first decides, so it is the steadiest.
        lost: what of the data was cut or left out because it is too long, as a report's source says it; empty if nothing.
    """

    metrics: tuple[Metric, ...]
    lost: str

    def __len__(self) -> int:
        """Number of examples."""

    def statistics(self, model: PreTrainedModel) -> tuple[Array, ...]:
        """For each metric the statistics of each example, [examples, statistics], under the model as it is now."""


@dataclass(frozen=True)
class Measurement:
    """What each metric's formula needs, at every measured rank.

    Attributes:
        metrics: in the order of the statistics.
        by_rank: rank to [examples, statistics] for each metric.
        base: the same without the adapter, or of what stands in its place; None where nothing does.
    """

    metrics: tuple[Metric, ...]
    by_rank: Mapping[int, tuple[Array, ...]]
    base: tuple[Array, ...] | None = None

    def values(self, index: int) -> dict[int, float]:
        """Rank to the value of metric number `index`."""
        return {rank: self.metrics[index].value(statistics[index]) for rank, statistics in self.by_rank.items()}


def measure(
    model: PreTrainedModel,
    select: Callable[[int | None], None],
    data: EvaluationSet,
    ranks: Iterable[int],
    with_base: bool = True,
) -> Measurement:
    """Measure at each of `ranks`, and without the adapter.

    Args:
        model: with the adapter.
        select: makes the model compute at a rank, or as the base alone: `AttachedAdapter.select`.
        data: what to measure on.
        ranks: in this order.
        with_base: measure the base as well; needs a `select` that takes None.
    """
    steps: Sequence[int | None] = [None, *ranks] if with_base else list(ranks)
    found: dict[int | None, tuple[Array, ...]] = {}
    with tqdm(steps, desc="evaluate", unit="rank") as progress:
        for rank in progress:
            progress.set_postfix_str("base" if rank is None else f"rank {rank}")
            select(rank)
            found[rank] = data.statistics(model)
    base = found.pop(None, None)
    return Measurement(data.metrics, {rank: each for rank, each in found.items() if rank is not None}, base)


def grouped_sums(rows: Array, groups: Sequence[int], examples: int) -> Array:
    """Sum rows that belong to one example: [rows, statistics] to [examples, statistics]."""
    sums = np.zeros((examples, rows.shape[1]))
    np.add.at(sums, np.asarray(groups), rows)
    return sums
