"""What is compared with what, and the file that the runs are kept in."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from loadtests.slo.client import Wish
from loadtests.slo.results import Outcome, summary
from loadtests.slo.trace import Arrivals

RANK = 64
"""The largest of each adapter."""
KEPT = "kept"
"""What the latency policy is called whose ranks stay."""
POLICIES: dict[str, Wish] = {
    "fixed 64": {"rank": 64},
    "fixed 16": {"rank": 16},
    "fixed 4": {"rank": 4},
    "auto": {"rank": "auto", "rank_policy": KEPT},
    "elastic": {"rank": "auto", "rank_policy": "latency"},
}
SCENARIOS_HELP = (
    "arrivals:requests a second, and :policy for one policy alone; arrivals are poisson, gamma (bursts, coefficient of"
    " variation 3) and step (the middle third at three times the load of the others)"
)


@dataclass(frozen=True)
class Run:
    """One trace under one policy."""

    arrivals: Arrivals
    rate: float
    policy: str
    seed: int


def planned(scenarios: str, seeds: int) -> Iterator[Run]:
    """Seed by seed, so that every slice of an experiment makes all figures surer.

    Args:
        scenarios: see SCENARIOS_HELP.
    """
    for seed in range(seeds):
        for scenario in scenarios.split(","):
            arrivals, rate, *only = scenario.split(":")
            for policy in only or POLICIES:
                yield Run(Arrivals(arrivals), float(rate), policy, seed)


class RunFile:
    """One line of JSON for each run, with the outcome of every request."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self) -> list[dict[str, Any]]:
        """All of them."""
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]

    def done(self) -> set[Run]:
        """The runs that are there."""
        return {Run(**{each.name: line[each.name] for each in fields(Run)}) for line in self.lines()}

    def add(self, run: Run, seconds: float, outcomes: Sequence[Outcome], **more: object) -> None:
        """Keep a run, and print its figures."""
        figures = {name: round(value, 4) for name, value in asdict(summary(outcomes, seconds, RANK)).items()}
        line = {**asdict(run), "seconds": seconds, **more, **figures}
        print(json.dumps(line), flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "outcomes": [list(asdict(each).values()) for each in outcomes]}) + "\n")
