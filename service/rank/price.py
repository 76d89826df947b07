"""The price of a unit of rank: the one that leaves the most quality in time.

A request's quality counts by how likely it is in time, and so does being in time itself, IN_TIME answers' worth: at a low price
much of the quality is late, at a high one little is left of it. What can't be saved, and what is in time anyway, has no say but
for its quality, so neither drives the ranks of the others down.
"""

import numpy as np

from service.rank.ladder import TOP, Floats
from service.rank.prospect import Prospect

IN_TIME = 3.0
"""What an answer in time is worth beside its quality, which is 1 at the full rank. Chosen in simulation: more saves a few late
ones in dense bursts, and takes more quality from all.
"""
NOTHING_GAINED = 0.02
"""What saves less than this share of the time is not worth any quality."""
_NEVER = 1e-9
_ALWAYS = 1e9


def best_level(prospect: Prospect, now: float, safety: float) -> int:
    """The level of `ladder.PRICES` that is worth most to those in flight; of equal ones the lowest.

    It does not rise further where that saves next to nothing.

    Args:
        prospect: of requests of which at least one has objectives.
        safety: the factor on predicted times.
    """
    full_s = prospect.full_s
    top = int(np.argmax(full_s <= full_s[TOP] * (1 + NOTHING_GAINED)))
    return int(np.argmax(_worth(prospect, now, safety)[: top + 1]))


def _worth(prospect: Prospect, now: float, safety: float) -> Floats:
    is_judged = np.array([each.has_objectives for each in prospect.requests], dtype=bool)
    requests = [each for each in prospect.requests if each.has_objectives]
    starts, ends = prospect.starts[is_judged, None], prospect.ends[is_judged, None]
    left = np.array([[_until(each.due_at, now)] for each in requests])
    total_s = prospect.seconds(prospect.work(ends))
    share = total_s / left
    if any(each.first_due_at is not None or each.gap_s is not None for each in requests):
        first_left = np.array([[_ALWAYS if each.generated else _until(each.first_due_at, now)] for each in requests])
        longest_gap = np.array([[each.gap_s or _ALWAYS] for each in requests])
        first_s = prospect.seconds(prospect.work(starts))
        gap_s = (total_s - first_s) / np.maximum(ends - starts, 1.0)
        share = np.maximum(share, np.maximum(first_s / first_left, gap_s / longest_gap))
    worth: Floats = (likelihood(safety * share) * (IN_TIME + np.array([each.worth for each in requests]))).sum(0)
    return worth


def _until(moment: float | None, now: float) -> float:
    return _ALWAYS if moment is None else max(_NEVER, moment - now)


def likelihood(share: Floats) -> Floats:
    """How likely it is that a request is in time whose predicted time is this share of what it has: 1 / (1 + share ** 8).

    That is 0.996 where half of the time is taken, 0.86 at 80% and 0.19 at 120%. Chosen in simulation: where it falls earlier,
    rank is given up for what is in time anyway, where it falls later, for less than what is late.
    """
    squared = share * share
    fourth = squared * squared
    likely: Floats = 1 / (1 + fourth * fourth)
    return likely
