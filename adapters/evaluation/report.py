"""A finished evaluation: what was found, and the files made of it."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapters.errors import AdapterError
from adapters.evaluation.findings import Findings, MetricReport
from adapters.evaluation.measurement import Measurement
from adapters.evaluation.names import REPORT_SUFFIXES
from adapters.evaluation.report_table import markdown_table
from adapters.evaluation.resampling import Array, Estimate, resampled_sums
from adapters.quality import QUALITY_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_FILES = ("quality.png", "quality.svg")
"""Names of the plot inside a folder."""


class Report(Findings):
    """What was found, as a caller of `evaluate` gets it: it can draw and write itself."""

    def figure(self) -> "Figure":
        """A panel for each metric over the rank, with its band, and the base and the full rank as lines."""
        from adapters.evaluation.report_plot import report_figure  # late: matplotlib takes a second to import

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
        if path.suffix == ".json":
            self.profile.save(path)
        elif path.suffix == ".md":
            path.write_text(markdown_table(self) + "\n", encoding="utf-8")
        else:
            from adapters.plots.line_plot import save_figure

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
