"""What came of a request's latency: the verdict on its objectives, and what later forecasts learn from it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from service.core import Aborted, Event, Finished, TokenEvent
from service.http.auto_rank import AutoRank
from service.http.metrics import Metrics
from service.rank.forecast import Ask
from service.rank.load import InFlight
from service.slo import Slo, Times


class Measurement:
    """One request, of one or several sequences, from its submission to the verdict.

    Args:
        slo: its objectives, perhaps none.
        policy: the name that the verdict is counted under.
        rank: the one that it is served at, 0 for the base.
        predicted: its times, where they could be.
        in_flight: requests that it found in flight.
        arrived_at: moment of `auto_rank.clock`.
    """

    def __init__(
        self,
        auto_rank: AutoRank,
        metrics: Metrics,
        *,
        slo: Slo,
        policy: str,
        rank: int,
        predicted: Times | None,
        in_flight: int,
        arrived_at: float,
    ) -> None:
        self.slo = slo
        self.rank = rank
        self.arrived_at = arrived_at
        self.book = auto_rank.book
        self.clock = auto_rank.clock
        self.predicted = predicted
        self.is_met: bool | None = None
        """Whether the objectives were met; None until all has ended, and for good where the client ended it."""
        self._margins = auto_rank.margins
        self._metrics = metrics
        self._policy = policy
        self._in_flight_before = in_flight
        self._lock = threading.Lock()
        self._open = 0
        self._is_good = True
        self._was_aborted = False

    def sequence(self, version: str | None, ask: Ask) -> "SequenceMeasurement":
        """One more of its sequences. Make all before the first is submitted."""
        self._open += 1
        return SequenceMeasurement(self, version, ask)

    def sequence_ended(self, times: Times | None, *, was_aborted: bool) -> None:
        """A sequence ended; `times` are given if it is complete."""
        if times is not None and self.predicted is not None:
            self._margins.observe(self._in_flight_before, self.predicted, times)
        with self._lock:
            self._open -= 1
            self._is_good &= times is not None and self.slo.is_met_by(times)
            self._was_aborted |= was_aborted
            is_judged = not self._open and not self._was_aborted and not self.slo.is_empty
            if is_judged:
                self.is_met = self._is_good
        if is_judged:
            self._metrics.slo(self._policy, "true" if self._is_good else "false")


class SequenceMeasurement:
    """One sequence. Its events come from the engine's thread."""

    def __init__(self, request: Measurement, version: str | None, ask: Ask) -> None:
        slo = request.slo
        due_at = None if slo.latency_ms is None else request.arrived_at + slo.latency_ms / 1000
        gap_s = None if slo.itl_ms is None else slo.itl_ms / 1000
        self._request = request
        self._in_flight = InFlight(version, request.rank, ask.prompt_tokens, ask.new_tokens, due_at, gap_s)
        self._first_token_at: float | None = None

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Around its submission: it counts as in flight from here on, unless the block raises."""
        self._request.book.add(
            self._in_flight, self._request.clock()
        )  # before, because its first event may come before `submit` returns
        try:
            yield
        except BaseException:
            self._request.book.remove(self._in_flight)
            raise

    def on_event(self, event: Event) -> None:
        """Take note of an event."""
        now = self._request.clock()
        if isinstance(event, TokenEvent):
            self._first_token_at = self._first_token_at or now
            self._request.book.token(self._in_flight)
            return
        self._request.book.remove(self._in_flight)
        times = None
        if isinstance(event, Finished) and self._first_token_at is not None:
            arrived_at = self._request.arrived_at
            first_s, total_s = self._first_token_at - arrived_at, now - arrived_at
            times = Times.measured(first_token_s=first_s, total_s=total_s, tokens=self._in_flight.generated)
        self._request.sequence_ended(times, was_aborted=isinstance(event, Aborted))
