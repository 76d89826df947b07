"""Tables, plots and page from the result files alone: `python -m adapters.paper.report --results DIR --to DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adapters.data.text_file import read_text
from adapters.errors import AdapterError, DataError
from adapters.paper.plan import RANKS, TASKS
from adapters.paper.results import LOSS, Result, read_results
from adapters.paper.step_time import read_step_times
from adapters.paper.summary import DRAWN, Way, by_rank, metric_of
from adapters.paper.tables import claims, generated
from adapters.plots.line_plot import Panel, Series, panels, save_figure

TEMPLATE = Path(__file__).parent / "RESULTS.md"
"""The page as committed; its hand-written parts are kept."""


def write_report(results: Path, to: Path) -> None:
    """Write `to`/RESULTS.md and a plot of each task under `to`/results.

    Raises:
        DataError: no results, a line that is none, or a page without the markers.
    """
    found = read_results(results)
    if not found:
        raise DataError(f"{results}: no results; `python -m adapters.paper` makes them")
    page = to / TEMPLATE.name
    text = read_text(page if page.exists() else TEMPLATE)
    text = between(text, "claims", claims(found))
    text = between(text, "tables", generated(found, read_step_times(results)))
    (to / "results").mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    for task in TASKS:
        if any(result.task == task.name for result in found):
            plot(found, task.name, to / "results")


def between(text: str, name: str, content: str) -> str:
    """`text` with `content` between the two markers of `name`. Raises DataError where they are missing."""
    start, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
    before, found_start, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise DataError(f"the page lacks {start} or {end}; expected both, in this order")
    return f"{before}{start}\n{content}\n{end}{after}"


def plot(results: Sequence[Result], task: str, folder: Path) -> None:
    """Draw loss and metric over the rank, with a band of one standard deviation, as PNG and SVG."""
    content = []
    for metric in (LOSS, metric_of(results, task)):
        drawn = [] if metric is None else [line for way in DRAWN if (line := _line(results, task, way, metric)) is not None]
        if metric is not None and drawn:
            content.append(Panel(drawn, x_label="rank", y_label=metric))
    if not content:
        return
    seeds = len({result.seed for result in results if result.task == task})
    caption = "one seed" if seeds == 1 else f"mean over {seeds} seeds, band: one standard deviation"
    figure = panels(content, title=task, caption=caption, inches=(5.2, 4.0))
    for suffix in (".png", ".svg"):
        save_figure(figure, folder / f"{task}{suffix}")


def _line(results: Sequence[Result], task: str, way: Way, metric: str) -> Series | None:
    spreads = {rank: spread for rank, spread in by_rank(results, task, way, metric).items() if rank in RANKS}
    if not spreads:
        return None
    means = [spread.mean for spread in spreads.values()]
    bands = [spread.deviation for spread in spreads.values()]
    low = [mean - band for mean, band in zip(means, bands, strict=True)]
    high = [mean + band for mean, band in zip(means, bands, strict=True)]
    return Series(way.label, list(spreads), means, low, high)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m adapters.paper.report", description="Tables, plots and page of the results."
    )
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="folder of the JSON lines")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="RESULTS.md goes here, the plots under results/")
    options = parser.parse_args(arguments)
    try:
        write_report(options.results, options.to)
    except AdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
