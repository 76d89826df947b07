"""Table and plots of an experiment: `python -m loadtests.slo.report OUT` reads its runs.jsonl.

Writes slo.md, and as .png and .svg the frontier: for each scenario the mean quality of the answers that were in time over the
share of requests that were, one point for each policy and seed.
"""

import argparse
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters.plots.line_plot import Panel, Series, panels, save_figure
from loadtests.slo.plan import RANK, RunFile
from loadtests.slo.results import Outcome, oracle, recovery_s, spread_of, summary

ORACLE = "oracle"
Runs = dict[tuple[str, float], dict[str, dict[int, list[Outcome]]]]
"""By scenario (arrivals, rate), policy and seed: the outcome of every request, in the order of the trace."""


def read_runs(file: Path) -> tuple[Runs, float]:
    """All runs, the oracle's among them, and the seconds of each."""
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    seconds = 0.0
    for line in RunFile(file).lines():
        seconds = line["seconds"]
        runs[line["arrivals"], line["rate"]][line["policy"]][line["seed"]] = [Outcome(*each) for each in line["outcomes"]]
    for policies in runs.values():
        fixed = [each for name, each in policies.items() if name.startswith("fixed")]
        seeds = set.intersection(*(set(each) for each in fixed)) if len(fixed) > 1 else set()
        if seeds:
            policies[ORACLE] = {seed: oracle([each[seed] for each in fixed]) for seed in sorted(seeds)}
    return runs, seconds


def table(runs: Runs, seconds: float) -> str:
    """One row for each scenario and policy: means over the seeds, smallest and largest in parentheses."""
    rows = [
        "| arrivals, per second | policy | met | quality of those | effective | goodput/s | full rank | changed | back in |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    for (arrivals, rate), policies in runs.items():
        for policy, seeds in policies.items():
            figures = [asdict(summary(each, seconds, RANK)) for each in seeds.values()]
            cells = [_share(figures, "met"), _number(figures, "quality"), _number(figures, "effective")]
            cells += [_number(figures, "goodput_per_s", 2), _share(figures, "full_rank"), _share(figures, "changed")]
            cells.append(_recovery(list(seeds.values()), seconds) if arrivals == "step" else "")
            rows.append(f"| {arrivals} {rate:g} | {policy} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _share(figures: list[dict[str, Any]], name: str) -> str:
    mean, low, high = (100 * each for each in spread_of([each[name] for each in figures]))
    return f"{mean:.1f}% ({low:.1f} to {high:.1f})"


def _number(figures: list[dict[str, Any]], name: str, digits: int = 3) -> str:
    mean, low, high = spread_of([each[name] for each in figures])
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _recovery(seeds: list[list[Outcome]], seconds: float) -> str:
    found = [recovery_s(each, seconds / 3, 2 * seconds / 3) for each in seeds]
    return ", ".join("never" if each is None else f"{each:.1f} s" for each in found)


def plot(runs: Runs, seconds: float, folder: Path) -> None:
    """Write frontier.png and frontier.svg."""
    content = []
    for (arrivals, rate), policies in runs.items():
        series = []
        for policy, seeds in policies.items():
            points = sorted((100 * each.met, each.quality) for each in (summary(one, seconds, RANK) for one in seeds.values()))
            series.append(Series(policy, [x for x, _ in points], [y for _, y in points]))
        if len(series) > 1:
            title = f"{arrivals}, {rate:g} per second"
            content.append(Panel(series, "requests in time, %", "their mean quality", title=title))
    for suffix in (".png", ".svg"):
        figure = panels(content, columns=3, caption="Each point is a seed. Up and to the right is better.")
        save_figure(figure, folder / f"frontier{suffix}")


def main() -> None:
    """Read a folder's runs and write the report beside them."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.slo.report", description=__doc__)
    parser.add_argument("out", type=Path, help="the experiment's folder")
    folder = parser.parse_args().out
    runs, seconds = read_runs(folder / "runs.jsonl")
    (folder / "slo.md").write_text(table(runs, seconds), encoding="utf-8")
    plot(runs, seconds, folder)
    print((folder / "slo.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
