"""One price for all: which rank an adapter's quality is worth at each price of a column.

Ranks of requests that share their steps compete for the same time. At a common price for a unit of rank, each takes the rank
whose quality, less what it costs, is highest: `max over b of quality(b) - price * b`. That is the Lagrangian of the best mean
quality for a given sum of ranks (Everett, "Generalized Lagrange multiplier method", 1963), so no exchange of rank between two
requests could make both better. Quality is relative to the adapter's best, since loss, BLEU and accuracy have other units.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

LEVELS = 40
"""Prices that are told apart: none, then rising by a third each, and one that nothing is worth."""
_CHEAPEST, _DEAREST = 1e-5, 1.0
_STEPS = LEVELS - 3
PRICES = (0.0, *(_CHEAPEST * (_DEAREST / _CHEAPEST) ** (number / _STEPS) for number in range(_STEPS + 1)), float("inf"))
"""Relative quality for one unit of rank."""
TOP = LEVELS - 1

Floats = NDArray[np.float64]
"""One number for each price.  # [LEVELS]"""

Ladder = tuple[int, ...]
"""The rank to take at each of PRICES; never rises. Where the rank was named it is constant, and of the base 0; where a policy
chose one to keep it is what the choice was made by, so that others like it are counted at the rank that each price gives them.
"""


def ladder(ranks: Sequence[int], quality: Mapping[int, float]) -> Ladder:
    """The rank at each price; of equal ones the smallest.

    Args:
        ranks: those to choose from, ascending, at least one.
        quality: of each of them, higher is better.
    """
    best = max(quality[rank] for rank in ranks)
    unit = abs(best) or 1.0
    relative = [(rank, (quality[rank] - best) / unit) for rank in ranks]

    def bought(price: float) -> int:
        return max(relative, key=lambda each: (each[1] - price * each[0], -each[0]))[0]

    return (*(bought(price) for price in PRICES[:-1]), ranks[0])


@lru_cache(maxsize=4096)
def kept_quality(steps: Ladder) -> Floats:
    """The share of the quality without a price that is kept at each price.

    A rank is given up at the price that its quality is worth, so what is lost is the sum of the ranks given up times their
    prices: between two of PRICES, their geometric mean.
    """
    prices = np.array(PRICES[:-1])
    between = np.sqrt(prices[1:] * prices[:-1])
    lost = np.concatenate([[0.0], np.cumsum(-np.diff(steps) * np.append(between, _DEAREST))])
    return np.maximum(1.0 - lost, 0.0)


def constant(rank: int) -> Ladder:
    """Of a request whose rank is the same at every price."""
    return _CONSTANT.setdefault(rank, (rank,) * LEVELS)


def bounded(steps: Ladder, least: int, most: int) -> Ladder:
    """The same between two ranks."""
    return tuple(min(max(rank, least), most) for rank in steps)


_CONSTANT: dict[int, Ladder] = {}
