"""What the results say: mean and spread over seeds, distance to LoRA trained at each rank, and cost. Pure."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from adapters.paper.plan import BEST, IDEAS, LORA, LORA_BEST_OPTIMISER, PAPER_METHODS, RANKS
from adapters.paper.results import FIRST_COLUMNS, LOSS, SVD_ORDER, TRAINED, Result


@dataclass(frozen=True)
class Way:
    """A way to an adapter of some rank: a row of the tables.

    Attributes:
        label: as tables and plots show it.
        method: the runs' method.
        variant: what is done with what they trained.
    """

    label: str
    method: str
    variant: str = TRAINED


SEPARATE = Way("LoRA trained at that rank", LORA)
"""What all others are held against: eight runs."""

WAYS: tuple[Way, ...] = (
    SEPARATE,
    Way("LoRA r8, first columns", LORA, FIRST_COLUMNS),
    Way("LoRA r8, SVD order", LORA, SVD_ORDER),
    *(Way(f"DyLoRA {nested.name.removeprefix('dylora-')}", nested.name) for nested in PAPER_METHODS),
    Way("ours", BEST.name),
)
SAME_OPTIMISER = Way("LoRA trained at that rank, our optimiser", LORA_BEST_OPTIMISER)
IDEA_WAYS: tuple[Way, ...] = tuple(Way(idea.idea, idea.name) for idea in IDEAS)


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (0 of a single value), and the number of values."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def by_rank(results: Iterable[Result], task: str, way: Way, metric: str) -> dict[int, Spread]:
    """The metric over seeds at each rank that was measured."""
    values: dict[int, list[float]] = {}
    for result in results:
        if (result.task, result.method) == (task, way.method):
            for rank, value in result.metrics.get(way.variant, {}).get(metric, {}).items():
                values.setdefault(rank, []).append(value)
    return {rank: Spread.of(values[rank]) for rank in sorted(values)}


def metric_of(results: Iterable[Result], task: str) -> str | None:
    """The task's metric besides the loss."""
    names = {m for r in results if r.task == task for by_name in r.metrics.values() for m in by_name if m != LOSS}
    return min(names, default=None)


def distance(results: Sequence[Result], task: str, way: Way, metric: str, reference: Way = SEPARATE) -> dict[int, float]:
    """How much worse than `reference` at each rank: per cent of its loss, or points of the metric. Negative is better."""
    own, other = by_rank(results, task, way, metric), by_rank(results, task, reference, metric)
    shared = [rank for rank in own if rank in other]
    if metric == LOSS:
        return {rank: 100 * (own[rank].mean / other[rank].mean - 1) for rank in shared}
    return {rank: other[rank].mean - own[rank].mean for rank in shared}


@dataclass(frozen=True)
class Cost:
    """CPU seconds of training, means over seeds.

    Attributes:
        one_run: of a nested adapter.
        sweep: of the LoRA runs at all ranks together; None unless all were run.
    """

    one_run: float
    sweep: float | None


def cost(results: Sequence[Result], task: str, method: str) -> Cost | None:
    """What a nested adapter costs beside the sweep; None where it wasn't trained."""
    own = [r.cpu_seconds for r in results if (r.task, r.method) == (task, method)]
    if not own:
        return None
    sweep: Mapping[int, list[float]] = {
        rank: [r.cpu_seconds for r in results if (r.task, r.method, r.rank) == (task, LORA, rank)] for rank in RANKS
    }
    whole = sum(statistics.fmean(each) for each in sweep.values()) if all(sweep.values()) else None
    return Cost(statistics.fmean(own), whole)
