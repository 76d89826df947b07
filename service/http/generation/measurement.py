"""What came of a request's latency: the verdict on its objectives, and what the safety factor learns from it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.core import Aborted, Event, Finished, TokenEvent
from service.http.metrics import BASE_LABEL, Metrics
from service.rank.auto_rank import AutoRank
from service.rank.ladder import TOP, constant
from service.rank.load import InFlight
from service.rank.prospect import Ask
from service.rank.rank_policy import RankDecision
from service.slo import Slo, Times


@dataclass
class Segment:
    """Tokens that were made one after the other at one rank."""

    rank: int
    tokens: int = 0


class Measurement:
    """One request, of one or several sequences, from its submission to the verdict.

    Args:
        slo: its objectives, perhaps none.
        decision: its rank; None for the base.
        predicted: its times, where they could be.
        arrived_at: moment of `auto_rank.clock`.
    """

    def __init__(
        self,
        auto_rank: AutoRank,
        metrics: Metrics,
        *,
        slo: Slo,
        decision: RankDecision | None,
        predicted: Times | None,
        arrived_at: float,
    ) -> None:
        self.slo = slo
        self.decision = decision
        self.arrived_at = arrived_at
        self.predicted = predicted
        self.is_met: bool | None = None
        """Whether the objectives were met; None until all has ended, and for good where the client ended it."""
        self.auto_rank = auto_rank
        self._metrics = metrics
        self._lock = threading.Lock()
        self._sequences = self._open = 0
        self._is_good = True
        self._was_aborted = False
        self.segments = [Segment(decision.rank)] if decision else []
        """Its ranks in turn, first the one that was chosen. Only of a request of one sequence they change."""

    def sequence(self, version: str | None, ask: Ask, change: Callable[[int], None] | None = None) -> "SequenceMeasurement":
        """One more of its sequences. Make all before the first is submitted.

        Args:
            change: how its rank is changed while it runs, if its policy is elastic.
        """
        self._sequences += 1
        self._open += 1
        return SequenceMeasurement(self, version, ask, change)

    def count_token(self, rank: int) -> None:
        """A token was made at a rank."""
        if self.segments and self.segments[-1].rank != rank:
            self.segments.append(Segment(rank))
        if self.segments:
            self.segments[-1].tokens += 1

    def sequence_ended(self, times: Times | None, *, was_aborted: bool) -> None:
        """A sequence ended; `times` are given if it is complete."""
        with self._lock:
            self._open -= 1
            self._is_good &= times is not None and self.slo.is_met_by(times)
            self._was_aborted |= was_aborted
            is_judged = not self._open and not self._was_aborted and not self.slo.is_empty
            if is_judged:
                self.is_met = self._is_good
        if is_judged:
            self._judge()

    def _judge(self) -> None:
        decision = self.decision
        self._metrics.slo(decision.policy if decision else BASE_LABEL, "true" if self._is_good else "false")
        # A rank that was named is not ours to learn from, nor one beside which there was no smaller one. Of several sequences
        # the last one's time was predicted, of which not one but all had to be in time: that is another error than others'.
        if self._sequences == 1 and decision is not None and decision.ladder[0] > decision.ladder[TOP]:
            self.auto_rank.safety.observe(is_late=not self._is_good)


class SequenceMeasurement:
    """One sequence of a request. Its events come from the engine's thread."""

    def __init__(self, request: Measurement, version: str | None, ask: Ask, change: Callable[[int], None] | None) -> None:
        slo, arrived_at, decision = request.slo, request.arrived_at, request.decision
        self._request = request
        self._book = request.auto_rank.book
        self._clock = request.auto_rank.clock
        self._in_flight = InFlight(
            version,
            decision.ladder if decision else constant(0),
            decision.rank if decision else 0,
            ask.prompt_tokens,
            ask.new_tokens,
            due_at=_moment(arrived_at, slo.latency_ms),
            first_due_at=_moment(arrived_at, slo.ttft_ms),
            gap_s=_moment(0.0, slo.itl_ms),
            change=change if decision is not None and decision.is_elastic else None,
        )
        self._first_token_at: float | None = None

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Around its submission: it counts as in flight from here on, unless the block raises."""
        self._book.add(self._in_flight, self._clock())  # before, because its first event may come before `submit` returns
        try:
            yield
        except BaseException:
            self._book.remove(self._in_flight)
            raise
        self._request.auto_rank.on_arrival()

    def on_event(self, event: Event) -> None:
        """Take note of an event."""
        now = self._clock()
        if isinstance(event, TokenEvent):
            self._first_token_at = self._first_token_at or now
            self._request.count_token(event.rank)
            self._book.token(self._in_flight)
            return
        self._book.remove(self._in_flight)
        times = None
        if isinstance(event, Finished) and self._first_token_at is not None:
            arrived_at = self._request.arrived_at
            first_s, total_s = self._first_token_at - arrived_at, now - arrived_at
            times = Times.measured(first_token_s=first_s, total_s=total_s, tokens=self._in_flight.generated)
        self._request.sequence_ended(times, was_aborted=isinstance(event, Aborted))


def _moment(start: float, after_ms: float | None) -> float | None:
    return None if after_ms is None else start + after_ms / 1000
