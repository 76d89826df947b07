"""What was measured at every rank, with confidence intervals, and the files made of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.errors import AdapterError
from adapters.evaluation.measurement import Measurement
from adapters.evaluation.names import REPORT_SUFFIXES
from adapters.evaluation.resampling import CONFIDENCE, Array, Estimate, resampled_sums
from adapters.quality import QUALITY_FILE, Metric, QualityProfile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_FILES = ("quality.png", "quality.svg")
"""Names of the plot inside a folder."""


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
class Report:
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

    def figure(self) -> "Figure":
        """A panel for each metric over the rank, with its band, and the base and the full rank as lines."""
        from adapters.evaluation.report_plot import report_figure

        return report_figure(self)

    def write(self, out: Path) -> tuple[Path, ...]:
        """Write profile and plots into the folder `out`, or one file as its suffix says; returns what was written.

        A folder gets quality.json, quality.png and quality.svg. A file may be .json (the profile), .png or .svg (the plot),
        or .md (the table).

        Raises:
            AdapterError: another suffix, or it can't be written.
        """
        paths = (out,) if out.suffix and not out.is_dir() else tuple(out / name for name in (QUALITY_FILE, *PLOT_FILES))
        if paths[0].suffix not in REPORT_SUFFIXES:
            raise AdapterError(f"{out} is neither a folder nor a file of {', '.join(REPORT_SUFFIXES)}")
        try:
            paths[0].parent.mkdir(parents=True, exist_ok=True)
            for path in paths:
                self._write_file(path)
        except OSError as error:
            raise AdapterError(f"{out}: can't be written: {error.strerror or error}") from error
        return paths

    def _write_file(self, path: Path) -> None:
        from adapters.evaluation.report_table import markdown_table
        from adapters.plots.line_plot import save_figure

        if path.suffix == ".json":
            self.profile.save(path)
        elif path.suffix == ".md":
            path.write_text(markdown_table(self) + "\n", encoding="utf-8")
        else:
            save_figure(self.figure(), path)


def report_of(
    measurement: Measurement,
    *,
    title: str,
    source: str,
    resamples: int = 1000,
    seed: int = 0,
    base_name: str = "base",
    notes: tuple[str, ...] = (),
) -> Report:
    """Values, intervals and differences of everything that was measured, on one set of resamples.

    Args:
        measurement: its largest rank is the full one.
        title, source, base_name, notes: see `Report`.
        resamples: of the bootstrap.
        seed: of its draws.
    """
    metrics = tuple(_metric_report(measurement, index, resamples, seed) for index in range(len(measurement.metrics)))
    examples = len(next(iter(measurement.by_rank.values()))[0])
    return Report(title, source, metrics, examples, resamples, seed, base_name, notes)


def _metric_report(measurement: Measurement, index: int, resamples: int, seed: int) -> MetricReport:
    metric = measurement.metrics[index]
    statistics: dict[int | None, Array] = {rank: each[index] for rank, each in sorted(measurement.by_rank.items())}
    if measurement.base is not None:
        statistics[None] = measurement.base[index]
    sums = resampled_sums(np.concatenate(list(statistics.values()), axis=1), resamples, seed)
    columns = np.split(sums, len(statistics), axis=1)
    values = {rank: metric.value(each) for rank, each in statistics.items()}
    resampled = {rank: metric.of_sums(each) for rank, each in zip(statistics, columns, strict=True)}
    ranks = sorted(measurement.by_rank)
    full = ranks[-1]
    return MetricReport(
        name=metric.name,
        higher_is_better=metric.higher_is_better,
        by_rank={rank: Estimate.of(values[rank], resampled[rank]) for rank in ranks},
        against_full={rank: Estimate.of(values[rank] - values[full], resampled[rank] - resampled[full]) for rank in ranks[:-1]},
        base=Estimate.of(values[None], resampled[None]) if None in values else None,
    )


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
