"""What was measured at every rank, with confidence intervals."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from adapters.evaluation.resampling import CONFIDENCE, Estimate
from adapters.quality import Metric, QualityProfile


class Verdict(StrEnum):
    """How a rank compares with the full one, by the paired 95% interval of the difference."""

    WORSE = "worse"
    SAME = "no clear difference"
    BETTER = "better"


@dataclass(frozen=True)
class MetricReport:
    """One metric at every measured rank.

    Attributes:
        name: with the unit where it has one.
        higher_is_better: its direction.
        by_rank: rank to the value and its interval.
        against_full: rank to the value minus that of the full rank, on the same resamples (Koehn 2004); every rank but
            the full one.
        base: the value without the adapter, if measured.
    """

    name: str
    higher_is_better: bool
    by_rank: Mapping[int, Estimate]
    against_full: Mapping[int, Estimate]
    base: Estimate | None = None

    def verdict(self, rank: int) -> Verdict:
        """Whether `rank` is worse than the full rank."""
        difference = self.against_full.get(rank)
        if difference is None or not (difference.is_above_zero or difference.is_below_zero):
            return Verdict.SAME
        return Verdict.BETTER if difference.is_above_zero == self.higher_is_better else Verdict.WORSE


@dataclass(frozen=True)
class Findings:
    """An adapter's quality at every measured rank.

    Attributes:
        title: which adapter on which model.
        source: what was measured on, and how.
        metrics: the first is the one that rank policies use.
        examples: how many were measured on, and are resampled.
        resamples, seed: of the bootstrap.
        base_name: what `base` stands for: the base model, or what takes its place.
        notes: what a reader has to know, a sentence each.
    """

    title: str
    source: str
    metrics: tuple[MetricReport, ...]
    examples: int
    resamples: int
    seed: int
    base_name: str = "base"
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """The measured ranks, ascending; the last is the full one."""
        return tuple(sorted(self.metrics[0].by_rank))

    @property
    def profile(self) -> QualityProfile:
        """The adapter's quality profile."""
        metrics = (
            Metric(
                name=each.name,
                higher_is_better=each.higher_is_better,
                values={rank: estimate.value for rank, estimate in each.by_rank.items()},
                intervals={rank: (estimate.low, estimate.high) for rank, estimate in each.by_rank.items()},
                base=None if each.base is None else each.base.value,
            )
            for each in self.metrics
        )
        return QualityProfile(tuple(metrics), self.source, self.examples)

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "title": self.title,
            "source": self.source,
            "examples": self.examples,
            "confidence": CONFIDENCE,
            "resamples": self.resamples,
            "seed": self.seed,
            "base": self.base_name,
            "notes": list(self.notes),
            "metrics": [_metric_json(metric) for metric in self.metrics],
        }


def _metric_json(metric: MetricReport) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": metric.name,
        "higher_is_better": metric.higher_is_better,
        "ranks": {str(rank): _estimate_json(estimate) for rank, estimate in metric.by_rank.items()},
        "against_full": {
            str(rank): {**_estimate_json(estimate), "verdict": metric.verdict(rank)}
            for rank, estimate in metric.against_full.items()
        },
    }
    return data if metric.base is None else {**data, "base": _estimate_json(metric.base)}


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "interval": [estimate.low, estimate.high]}
