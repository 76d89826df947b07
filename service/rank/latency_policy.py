"""The best rank that a deadline allows: pure functions of what is predicted, what is demanded and what each rank is worth."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from service.errors import SloUnattainable
from service.rank.forecast import Alike, Forecast
from service.slo import Slo, Times

NOTHING_GAINED = 0.02
"""Where the smallest rank saves less than this share of every time, rank does not move latency."""
HOPELESS = 0.5
"""An objective under this share of what is predicted of an idle server, at its smallest rank and for the shortest answer, is
impossible, whatever the error of the prediction."""
_NO_LIMIT = float("inf")


@dataclass(frozen=True)
class Outlook:
    """What is predicted of one request at every rank.

    Attributes:
        forecast: its times beside what is in flight.
        merged: its times if its steps run with merged weights, which do not depend on the rank.
        merged_ranks: the ranks at which they would: merged already, and nothing else in flight.
        alike: how steps become if those that arrive next are given its rank as well.
        idle: its forecast if nothing else were in flight.
        margins: factors that make a forecast safe.
        elapsed_ms: since its arrival.
    """

    forecast: Forecast
    margins: Times
    alike: Callable[[], Alike | None]
    idle: Callable[[], Forecast | None]
    merged: Forecast | None = None
    merged_ranks: frozenset[int] = frozenset()
    elapsed_ms: float = 0.0

    def with_others_following(self) -> "Outlook":
        """The same for a choice that those who arrive next will make alike."""
        return replace(self, forecast=replace(self.forecast, alike=self.alike()))

    def at(self, rank: int) -> Times:
        """Its predicted times at a rank, from its arrival."""
        return self._after_elapsed(self._forecast(rank).at(rank))

    def safe_at(self, rank: int) -> Times:
        """Those times with their margins."""
        return self._after_elapsed(self._forecast(rank).at(rank).times(self.margins))

    def limits(self, slo: Slo, floor: int) -> Times:
        """The largest predictions, without margins, at which the objectives are met.

        Those of the others in flight are among them, as far as the smallest rank would keep them.
        """
        least_s = self.forecast.step_s(floor)
        others_s = min((limit for limit in self.forecast.load.step_limits_s if limit >= least_s), default=_NO_LIMIT)
        return Times(
            _NO_LIMIT if slo.ttft_ms is None else (slo.ttft_ms - self.elapsed_ms) / self.margins.ttft_ms,
            min(_NO_LIMIT if slo.itl_ms is None else slo.itl_ms / self.margins.itl_ms, 1000 * others_s),
            _NO_LIMIT if slo.latency_ms is None else (slo.latency_ms - self.elapsed_ms) / self.margins.latency_ms,
        )

    def check_possible(self, slo: Slo, rank: int, policy: str) -> None:
        """Refuse what not even an idle server could do at this rank.

        Raises:
            SloUnattainable: saying what is attainable; counted under `policy`.
        """
        idle = None if slo.is_empty else self.idle()
        if idle is not None and not slo.is_met_by(idle.soonest(rank).times(Times(HOPELESS, HOPELESS, HOPELESS))):
            raise SloUnattainable(policy, slo, rank, idle.at(rank), "on an idle server", is_for_good=True)

    def _forecast(self, rank: int) -> Forecast:
        return self.merged if self.merged is not None and rank in self.merged_ranks else self.forecast

    def _after_elapsed(self, times: Times) -> Times:
        return Times(times.ttft_ms + self.elapsed_ms, times.itl_ms, times.latency_ms + self.elapsed_ms)


def best_rank(outlook: Outlook, slo: Slo, ranks: Sequence[int], quality: Mapping[int, float]) -> int | None:
    """The rank of the highest quality that is predicted to meet the objectives, None where none is.

    Neither may it keep others from their objectives that are in flight. Of several ranks of the same quality it is the one
    that is merged already, else the smallest. Where rank does not move latency it is the best of all ranks, whatever is
    predicted: a smaller one would be worse and no sooner.

    Args:
        ranks: those to choose from, ascending, at least one.
        quality: of each of them, higher is better.
    """
    if _is_flat(outlook.forecast.at(ranks[0]), outlook.forecast.at(ranks[-1])):
        return _best([*reversed(ranks)], quality, outlook.merged_ranks)
    ttft_ms, itl_ms, latency_ms = outlook.limits(slo, ranks[0])

    def fails(rank: int) -> bool:
        times = outlook.forecast.at(rank)
        return times.ttft_ms > ttft_ms or times.itl_ms > itl_ms or times.latency_ms > latency_ms

    if not outlook.merged_ranks:
        # No time falls as the rank rises, so those that fail come last.
        return _best(ranks[: bisect_left(ranks, True, key=fails)], quality, outlook.merged_ranks)
    mixed = [rank for rank in ranks if rank not in outlook.merged_ranks]
    merged = [rank for rank in ranks if rank in outlook.merged_ranks and slo.is_met_by(outlook.safe_at(rank))]
    return _best(mixed[: bisect_left(mixed, True, key=fails)] + merged, quality, outlook.merged_ranks)


def _best(ranks: Sequence[int], quality: Mapping[int, float], merged: frozenset[int]) -> int | None:
    """The rank of the highest quality; of several the merged one, else the first."""
    if not ranks:
        return None
    best = max(ranks, key=quality.__getitem__)
    alike = [rank for rank in merged if rank in ranks and quality[rank] == quality[best]]
    return alike[0] if alike else best


def _is_flat(least: Times, most: Times) -> bool:
    return all(high <= low * (1 + NOTHING_GAINED) for low, high in zip(least, most, strict=True))
