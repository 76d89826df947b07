"""The best rank that a deadline allows: a pure function of what is predicted, what is demanded and what each rank is worth."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from service.errors import SloUnattainable
from service.rank.ladder import TOP, Ladder
from service.rank.load import InFlight
from service.rank.prospect import Outlook, Prospect
from service.slo import Slo, Times

NOTHING_GAINED = 0.02
"""What saves less than this share of the time is not worth any quality."""
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
    """

    mixed: Outlook
    price: int
    held_price: int
    safety: float
    idle: Callable[[], Outlook | None]
    merged: Outlook | None = None
    merged_ranks: frozenset[int] = frozenset()

    @property
    def in_flight(self) -> int:
        """Requests that it finds."""
        return self.mixed.prospect.in_flight

    def at(self, rank: int, level: int | None = None) -> Times:
        """Its expected times at a rank, if the others have those of a price: the one of now unless given."""
        outlook = self.merged if self.merged is not None and rank in self.merged_ranks else self.mixed
        return outlook.at(self.price if level is None else level, rank)

    def is_safe(self, slo: Slo, level: int, rank: int) -> bool:
        """Whether the objectives are met even if all takes longer by the safety factor."""
        return slo.is_met_by(self.mixed.at(level, rank, self.safety))

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


def best_rank(
    prediction: Prediction,
    slo: Slo,
    ranks: Sequence[int],
    ladder: Ladder,
    quality: Mapping[int, float],
    *,
    is_elastic: bool,
) -> int | None:
    """The rank at the lowest price at which the request is predicted to meet its objectives, None where it is at none.

    The price is at least the one that those in flight need. Of ranks of the same quality it is the one that is merged already.
    Where rank does not move latency it is the best of all ranks, whatever is predicted: a smaller one would be worse and no
    sooner.

    Args:
        ranks: those to choose from, ascending, at least one.
        ladder: the one of them at each price.
        quality: of each of them, higher is better.
        is_elastic: its rank may be changed while it runs.
    """
    least = prediction.price if is_elastic else max(prediction.price, prediction.held_price)
    rank = _at_lowest_price(prediction, slo, ladder, least)
    merged = _merged_rank(prediction, slo, ranks, quality) if prediction.merged_ranks else None
    if merged is not None and (rank is None or quality[merged] >= quality[rank]):
        return merged
    return rank


def _at_lowest_price(prediction: Prediction, slo: Slo, ladder: Ladder, least: int) -> int | None:
    if prediction.is_safe(slo, least, ladder[least]):
        return ladder[least]
    if _is_flat(prediction.mixed.at(TOP, ladder[TOP]), prediction.mixed.at(0, ladder[0])):
        return ladder[0]
    levels = range(least + 1, TOP + 1)
    at = bisect_left(levels, True, key=lambda level: prediction.is_safe(slo, level, ladder[level]))
    return ladder[levels[at]] if at < len(levels) else None


def lowest_price(prospect: Prospect, due: Iterable[InFlight], now: float, safety: float) -> int:
    """The lowest level of the price at which all these requests are predicted to be on time.

    What no price can save must not cost the others their ranks, nor does a price rise further where that saves next to nothing.

    Args:
        safety: the factor on what is still to come.
    """
    gaps = prospect.gap_s
    top = next(level for level, gap_s in enumerate(gaps) if gap_s <= gaps[TOP] * (1 + NOTHING_GAINED))
    tokens = prospect.waiting_prompt_tokens

    def late(level: int, gap_s: float, factor: float) -> Callable[[InFlight], bool]:
        gap_s *= factor
        reading_s = factor * prospect.reading_s(tokens, level) if tokens else 0.0

        def is_late(each: InFlight) -> bool:
            remaining = each.new_tokens - each.generated
            return (
                (each.due_at is not None and now + reading_s + remaining * gap_s > each.due_at)
                or (each.first_due_at is not None and not each.generated and now + reading_s > each.first_due_at)
                or (each.gap_s is not None and gap_s > each.gap_s)
            )

        return is_late

    is_lost = late(top, prospect.least_gap_s, 1.0)
    hopeful = [each for each in due if not is_lost(each)]
    return bisect_left(range(top), True, key=lambda level: any(map(late(level, gaps[level], safety), hopeful)) is False)


def _merged_rank(prediction: Prediction, slo: Slo, ranks: Sequence[int], quality: Mapping[int, float]) -> int | None:
    """The best of the ranks that run merged, if it is predicted to be in time so."""
    merged = prediction.merged
    if merged is None or not slo.is_met_by(merged.at(0, 0, prediction.safety)):
        return None
    return max(prediction.merged_ranks.intersection(ranks), key=quality.__getitem__, default=None)


def _is_flat(least: Times, most: Times) -> bool:
    return all(high <= low * (1 + NOTHING_GAINED) for low, high in zip(least, most, strict=True))
