"""A report as a figure: a panel for each metric over the rank."""

from matplotlib.figure import Figure

from adapters.evaluation.completions import PERPLEXITY
from adapters.evaluation.findings import Findings, MetricReport
from adapters.evaluation.resampling import CONFIDENCE
from adapters.plots.line_plot import Level, Panel, Series, panels

_UNITS = {"loss per completion token": "nats", "loss per token": "nats", "loss per example": "nats"}


def report_figure(report: Findings) -> Figure:
    """Each metric's value and 95% band over the rank; base and full rank as dashed lines.

    Perplexity is left out where the loss is there: it is the same curve on another axis.
    """
    shown = [metric for metric in report.metrics if metric.name != PERPLEXITY.name or len(report.metrics) == 1]
    caption = (
        f"{report.source}. Bands: {CONFIDENCE:.0%} confidence, bootstrap over {report.examples} examples "
        f"({report.resamples} resamples)."
    )
    columns = 2 if len(shown) == 4 else 3
    return panels([_panel(metric, report) for metric in shown], columns=columns, title=report.title, caption=caption)


def _panel(metric: MetricReport, report: Findings) -> Panel:
    ranks = report.ranks
    estimates = [metric.by_rank[rank] for rank in ranks]
    series = Series(
        metric.name,
        ranks,
        [each.value for each in estimates],
        [each.low for each in estimates],
        [each.high for each in estimates],
    )
    levels = [Level(f"rank {ranks[-1]}", estimates[-1].value)]
    if metric.base is not None:
        levels.append(Level(report.base_name, metric.base.value))
    unit = f" ({_UNITS[metric.name]})" if metric.name in _UNITS else ""
    better = "higher is better" if metric.higher_is_better else "lower is better"
    return Panel([series], "rank", metric.name + unit, better, levels, log2_x=True)
