"""Tokens per second at several numbers of rows, all engines taking turns."""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from loadtests import workload
from loadtests.bench.contenders import Contender
from loadtests.bench.figures import Figures

_PAUSE_S = 1.5


class Point(NamedTuple):
    """One engine at one kind of work."""

    contender: Contender
    mode: str


def compare_rates(contenders: Sequence[Contender], modes: Sequence[str], batch: int, rounds: int, figures: Figures) -> None:
    """Let every engine do every kind of work that it can, and the first be compared with itself and the others.

    They take turns inside each round, so that a machine whose speed drifts slows all of them, and the medians of ratios hold
    where absolute figures do not. The first round, which warms up, is not counted. Between two engines
    there is a pause: the threads of some look for work a second longer (vLLM's on 0.8 of a core).
    """
    points = [Point(each, mode) for each in contenders for mode in modes if mode in each.modes]
    seconds: dict[Point, list[float]] = {point: [] for point in points}
    last = points[0].contender
    for number in range(rounds + 1):
        for point in points:
            if point.contender is not last:
                time.sleep(_PAUSE_S)
                last = point.contender
            took = point.contender.run(point.mode, batch)
            if number:
                seconds[point].append(took)
    for point in points:
        rate = batch * workload.NEW_TOKENS / statistics.median(seconds[point])
        figures.show(engine=point.contender.name, mode=point.mode, batch=batch, tokens_per_s=round(rate, 1))
    ours = points[0].contender
    for point in (point for point in points if point.contender is ours):
        for other in (other for other in points if _is_compared(point, other)):
            ratio = statistics.median(theirs / mine for theirs, mine in zip(seconds[other], seconds[point], strict=True))
            whose = "own" if other.contender is ours else other.contender.name
            figures.judge(f"{point.mode} / {whose} {other.mode}, batch {batch}", ratio)


def _is_compared(point: Point, other: Point) -> bool:
    """With the base of every engine, with others at the same kind of work, and many adapters with few."""
    if other.contender is point.contender:
        return other.mode == "base" != point.mode or (point.mode, other.mode) == ("zipf", "mixed")
    return other.mode in ("base", point.mode)
