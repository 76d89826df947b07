"""The best rank that a deadline allows: a pure function of what is predicted, what is demanded and what each rank is worth."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from service.errors import SloUnattainable
from service.rank.ladder import TOP, Ladder
from service.rank.price import NOTHING_GAINED
from service.rank.prospect import Outlook
from service.slo import Slo, Times

HOPELESS = 0.5
"""An objective under this share of what is predicted of an idle server, at its smallest rank and for the shortest answer, is
impossible, whatever the error of the prediction."""


@dataclass(frozen=True)
class Prediction:
    """What is predicted of one request, and at which price of a column its rank is chosen.

    Attributes:
        mixed: its times beside what is in flight.
        price, held_price: levels of the price, for a request whose rank can be changed later and for one that keeps it.
        safety: the factor on what is still to come.
        idle: its times if nothing else were in flight; None where they can't be predicted.
        merged: its times if its steps run with merged weights, which do not depend on the rank.
        merged_ranks: the ranks at which they would: merged already, and nothing else in flight.
        siblings: how many sequences more it has, which count among those in flight of the two above.
    """

    mixed: Outlook
    price: int
    held_price: int
    safety: float
    idle: Callable[[], Outlook | None]
    merged: Outlook | None = None
    merged_ranks: frozenset[int] = frozenset()
    siblings: int = 0

    @property
    def in_flight(self) -> int:
        """Requests that it finds."""
        return self.mixed.prospect.in_flight - self.siblings

    def at(self, rank: int, level: int | None = None) -> Times:
        """Its expected times at a rank, if the others have those of a price: the one of now unless given."""
        outlook = self.merged if self.merged is not None and rank in self.merged_ranks else self.mixed
        return outlook.at(self.price if level is None else level, rank)

    def is_safe(self, slo: Slo, level: int, rank: int) -> bool:
        """Whether the objectives are met even if all takes longer by the safety factor."""
        return slo.is_met_by(self.mixed.at(level, rank, self.safety))

    def is_moved_by_rank(self, ladder: Ladder) -> bool:
        """Whether any time is shorter at the highest price than at none, for it and for the others."""
        least, most = self.mixed.at(TOP, ladder[TOP]), self.mixed.at(0, ladder[0])
        return any(high > low * (1 + NOTHING_GAINED) for low, high in zip(least, most, strict=True))

    def check_possible(self, slo: Slo, rank: int, policy: str) -> None:
        """Refuse what not even an idle server could do at this rank.

        Raises:
            SloUnattainable: saying what is attainable; counted under `policy`.
        """
        if slo.is_empty or slo.is_met_by(_hopeless(self.mixed, rank)):  # on an idle server it is no later than beside others
            return
        idle = self.idle()
        if idle is not None and not slo.is_met_by(_hopeless(idle, rank)):
            raise SloUnattainable(policy, slo, rank, idle.at(TOP, rank), "on an idle server", is_for_good=True)


def _hopeless(outlook: Outlook, rank: int) -> Times:
    return outlook.soonest(TOP, rank).times(Times(HOPELESS, HOPELESS, HOPELESS))


class Choice(NamedTuple):
    """A rank, and the times that are expected at it."""

    rank: int
    predicted: Times


def best_rank(
    prediction: Prediction,
    slo: Slo,
    ranks: Sequence[int],
    ladder: Ladder,
    quality: Mapping[int, float],
    *,
    is_elastic: bool,
) -> Choice | None:
    """The rank at the lowest price at which the request is predicted to meet its objectives, None where it is at none.

    The price is at least the one of those in flight. Of ranks of the same quality it is the one that is merged already.

    Args:
        ranks: those to choose from, ascending, at least one.
        ladder: the one of them at each price.
        quality: of each of them, higher is better.
        is_elastic: its rank may be changed while it runs.
    """
    least = prediction.price if is_elastic else max(prediction.price, prediction.held_price)
    level = _lowest_price(prediction, slo, ladder, least)
    merged = _merged_choice(prediction, slo, ranks, quality) if prediction.merged_ranks else None
    if merged is not None and (level is None or quality[merged.rank] >= quality[ladder[level]]):
        return merged
    return None if level is None else Choice(ladder[level], prediction.mixed.at(level, ladder[level]))


def _lowest_price(prediction: Prediction, slo: Slo, ladder: Ladder, least: int) -> int | None:
    """With the safety factor, or the highest price where it is in time only without."""
    if prediction.is_safe(slo, least, ladder[least]):
        return least
    if prediction.is_safe(slo, TOP, ladder[TOP]):
        levels = range(least + 1, TOP)
        return least + 1 + bisect_left(levels, True, key=lambda level: prediction.is_safe(slo, level, ladder[level]))
    return TOP if slo.is_met_by(prediction.mixed.at(TOP, ladder[TOP])) else None


def _merged_choice(prediction: Prediction, slo: Slo, ranks: Sequence[int], quality: Mapping[int, float]) -> Choice | None:
    """The best of the ranks that run merged, if it is predicted to be in time so."""
    merged = prediction.merged
    if merged is None or not slo.is_met_by(merged.at(0, 0, prediction.safety)):
        return None
    best = max(prediction.merged_ranks.intersection(ranks), key=quality.__getitem__, default=None)
    return None if best is None else Choice(best, merged.at(0, 0))
