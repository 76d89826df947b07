"""The frontier as a plot: what each policy achieves as the load rises."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.plots.line_plot import Panel, Series, panels, save_figure
from loadtests.slo.results import spread_of

FIGURES = (
    ("met", "share that met its deadline"),
    ("effective", "quality, 0 where the deadline was missed"),
)


def plot(lines: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write slo.svg: for each kind of arrivals, share met and effective quality over the rate, with the seeds' spread."""
    runs: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if "policy" in line:
            runs[str(line["arrivals"]), str(line["policy"]), float(line["rate"])].append(line)
    policies = list(dict.fromkeys(policy for _, policy, _ in runs))
    content = []
    for arrivals in dict.fromkeys(arrivals for arrivals, _, _ in runs):
        for figure, label in FIGURES:
            series = []
            for policy in policies:
                rates = sorted(rate for a, p, rate in runs if (a, p) == (arrivals, policy))
                over = [spread_of([float(run[figure]) for run in runs[arrivals, policy, rate]]) for rate in rates]
                mean, low, high = zip(*over, strict=True)
                series.append(Series(policy, rates, mean, low, high))
            content.append(Panel(series, "requests per second", label, title=arrivals))
    save_figure(
        panels(content, columns=2, caption="Lines: means over the seeds; bands: smallest and largest."), folder / "slo.svg"
    )
