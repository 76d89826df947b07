"""What each rank of an adapter is worth, from its measured quality or from a guess by its energy."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from adapters.quality import Metric, QualityProfile

ENERGY_PRIOR = "energy prior"
"""The source of a profile that nobody has measured."""


def energy_prior(energy: Sequence[float], ranks: Sequence[int]) -> QualityProfile:
    """A guess for an adapter without measurements: the share of its update's energy that each rank keeps.

    Args:
        energy: at ranks 1, 2, ..., r_max.
        ranks: the legal ones.
    """
    values = {rank: energy[rank - 1] for rank in ranks}
    return QualityProfile((Metric("energy share", higher_is_better=True, values=values),), ENERGY_PRIOR)


def quality_by_rank(ranks: Sequence[int], profile: QualityProfile | None) -> Mapping[int, float]:
    """Every rank's quality, higher is better.

    Between two measured ranks it is read off the straight line over the logarithm of the rank; outside them it is that of the
    nearest. Without any profile a larger rank is better, by less and less: the logarithm stands in.
    """
    if profile is None:
        return {rank: math.log1p(rank) for rank in ranks}
    metric = profile.primary
    sign = 1.0 if metric.higher_is_better else -1.0
    known = sorted((rank, sign * value) for rank, value in metric.values.items())
    return {rank: _interpolated(known, rank) for rank in ranks}


def _interpolated(known: Sequence[tuple[int, float]], rank: int) -> float:
    place = bisect_left(known, rank, key=lambda each: each[0])
    if place == len(known):
        return known[-1][1]
    upper_rank, upper = known[place]
    if upper_rank == rank or place == 0:
        return upper
    lower_rank, lower = known[place - 1]
    share = math.log(rank / lower_rank) / math.log(upper_rank / lower_rank)
    return lower + share * (upper - lower)
