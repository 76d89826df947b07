"""A report as a table: a row for each rank, a column for each metric."""

import json
from collections.abc import Sequence

from adapters.evaluation.findings import Findings, MetricReport, Verdict
from adapters.evaluation.resampling import CONFIDENCE, Estimate

_MARKS = {Verdict.WORSE: "-", Verdict.SAME: " ", Verdict.BETTER: "+"}


def text_table(report: Findings) -> str:
    """For a terminal: aligned columns, and what the marks mean below."""
    rows = _rows(report)
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)).rstrip() for row in rows]
    return "\n".join([report.title, "", *lines, "", *_remarks(report)])


def markdown_table(report: Findings) -> str:
    """For a document."""
    header, *rows = _rows(report)
    lines = [f"| {' | '.join(cell.strip() for cell in row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join([f"**{report.title}**", "", *lines, "", *_remarks(report)])


def json_text(report: Findings) -> str:
    """For programs."""
    return json.dumps(report.to_json(), indent=2, allow_nan=False)


def number(value: float) -> str:
    """Three decimals below ten, one from there on."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _rows(report: Findings) -> list[list[str]]:
    rows = [["rank", *(metric.name for metric in report.metrics)]]
    if all(metric.base is None for metric in report.metrics):
        return rows + [_rank_row(report, rank) for rank in report.ranks]
    base = [_cell(metric.base) for metric in report.metrics]
    return [*rows, [report.base_name, *base], *(_rank_row(report, rank) for rank in report.ranks)]


def _rank_row(report: Findings, rank: int) -> list[str]:
    return [str(rank), *(f"{_cell(metric.by_rank[rank])} {_mark(metric, rank)}" for metric in report.metrics)]


def _mark(metric: MetricReport, rank: int) -> str:
    return _MARKS[metric.verdict(rank)]


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "n/a"
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def _remarks(report: Findings) -> Sequence[str]:
    bootstrap = f"{report.resamples} resamples of {report.examples} examples, seed {report.seed}"
    lines = [report.source, f"[ ]: {CONFIDENCE:.0%} confidence intervals by bootstrap, {bootstrap}"]
    if len(report.ranks) > 1:
        lines.append(f"-, +: worse, better than rank {report.ranks[-1]}: {CONFIDENCE:.0%} interval of the paired difference")
    return [*lines, *report.notes]
