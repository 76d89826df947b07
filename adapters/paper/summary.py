"""What the results say: mean and spread over seeds, distance to LoRA trained at each rank, and cost. Pure."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adapters.paper.plan import BEST, BEST_SMALL, IDEAS, LORA, PAPER_METHODS, RANKS, ROWS, ROWS_SMALL
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

CUT_AS_TRAINED = Way("LoRA r8, first columns", LORA, FIRST_COLUMNS)
CUT_BY_SVD = Way("LoRA r8, SVD order", LORA, SVD_ORDER)
FULL, FROZEN, GEOMETRIC = (Way(f"DyLoRA {each.name.removeprefix('dylora-')}", each.name) for each in PAPER_METHODS)
OURS_PLAIN = Way("ours, for the cost of one LoRA run", ROWS.name)
OURS = Way("ours, for the cost of two", BEST.name)
OURS_PLAIN_SMALL = Way(f"{OURS_PLAIN.label}, smaller start", ROWS_SMALL.name)
OURS_SMALL = Way(f"{OURS.label}, smaller start", BEST_SMALL.name)

WAYS: tuple[Way, ...] = (
    SEPARATE,
    CUT_AS_TRAINED,
    CUT_BY_SVD,
    FULL,
    FROZEN,
    GEOMETRIC,
    OURS_PLAIN,
    OURS_PLAIN_SMALL,
    OURS,
    OURS_SMALL,
)
"""The rows of every table, in order."""
DRAWN: tuple[Way, ...] = tuple(way for way in WAYS if way not in (OURS_PLAIN_SMALL, OURS_SMALL))
"""The lines of every plot: the smaller starts would lie on ours, and colours would come twice."""
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
    values = _by_rank_and_seed(results, task, way, metric)
    return {rank: Spread.of(list(values[rank].values())) for rank in sorted(values)}


def _by_rank_and_seed(results: Iterable[Result], task: str, way: Way, metric: str) -> dict[int, dict[int, float]]:
    values: dict[int, dict[int, float]] = {}
    for result in results:
        if (result.task, result.method) == (task, way.method):
            for rank, value in result.metrics.get(way.variant, {}).get(metric, {}).items():
                values.setdefault(rank, {})[result.seed] = value
    return values


def metric_of(results: Iterable[Result], task: str) -> str | None:
    """The task's metric besides the loss."""
    names = {m for r in results if r.task == task for by_name in r.metrics.values() for m in by_name if m != LOSS}
    return min(names, default=None)


def distance(results: Sequence[Result], task: str, way: Way, metric: str, reference: Way = SEPARATE) -> dict[int, float]:
    """How much worse than `reference` at each rank: per cent of its loss, or points of the metric. Negative is better.

    Of the means over the seeds that both have: data, batches and fresh heads differ with the seed.
    """
    own, other = (_by_rank_and_seed(results, task, each, metric) for each in (way, reference))
    found = {}
    for rank in sorted(own.keys() & other.keys()):
        if seeds := sorted(own[rank].keys() & other[rank].keys()):
            mine, theirs = (statistics.fmean(each[rank][seed] for seed in seeds) for each in (own, other))
            found[rank] = 100 * (mine / theirs - 1) if metric == LOSS else theirs - mine
    return found


@dataclass(frozen=True)
class Cost:
    """CPU seconds of training on one kind of processor.

    Attributes:
        one_run: of a nested adapter, the mean over seeds.
        sweep: of LoRA at all ranks: the mean over the ranks that were trained on that processor, times their number, since
            a run costs the same at each; None where there is none.
        ranks: of those ranks.
    """

    one_run: float
    sweep: float | None
    ranks: tuple[int, ...]


def cost(results: Sequence[Result], task: str, method: str) -> Cost | None:
    """What a nested adapter costs beside the sweep; None where it wasn't trained.

    Of several processors the one on which LoRA was trained at the most ranks: seconds of different ones don't compare.
    """
    own = [r for r in results if (r.task, r.method) == (task, method)]
    found = [_cost([r for r in own if r.processor == each], results, task) for each in {r.processor for r in own}]
    return max(found, key=lambda cost: len(cost.ranks), default=None)


def _cost(own: Sequence[Result], results: Sequence[Result], task: str) -> Cost:
    lora: dict[int, list[float]] = {}
    for r in results:
        if (r.task, r.method, r.processor) == (task, LORA, own[0].processor) and r.rank is not None:
            lora.setdefault(r.rank, []).append(r.cpu_seconds)
    sweep = len(RANKS) * statistics.fmean(map(statistics.fmean, lora.values())) if lora else None
    return Cost(statistics.fmean(r.cpu_seconds for r in own), sweep, tuple(sorted(lora)))
