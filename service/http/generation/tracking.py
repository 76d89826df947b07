"""What is counted, remembered and logged of each request, at its terminal event: exactly once, read or not."""

import time
from dataclasses import dataclass

from service.core import Aborted, Event, Failed, Finished, TokenEvent
from service.errors import DeadlinePassed, SlowReader
from service.http.latencies import Latencies
from service.http.limits import DrainRate
from service.http.metrics import BASE_LABEL, Metrics
from service.http.tracing import Phase, RequestTrace, current_trace
from service.log import entry, logger


@dataclass(frozen=True)
class TrackedRequest:
    """What a request is counted under.

    Attributes:
        rank: that it begins with; 0 without adapter.
        key: name of the API key, "" without.
        reason: why this rank, None without adapter.
    """

    request_id: str
    adapter: str | None
    rank: int
    prompt_tokens: int
    key: str = ""
    reason: str | None = None


class RequestTracker:
    """Follows one request from the engine's thread, from its submission on.

    Args:
        arrived_at: moment of `time.monotonic`, from which the metrics count.
    """

    def __init__(
        self, metrics: Metrics, drain_rate: DrainRate, latencies: Latencies, request: TrackedRequest, arrived_at: float
    ) -> None:
        self._metrics = metrics
        self._drain_rate = drain_rate
        self._latencies = latencies
        self._request = request
        self._trace = current_trace()
        self._arrived_at = arrived_at
        self._started_at = time.monotonic()
        self._first_token_at: float | None = None
        self._last_token_at: float | None = None
        self._tokens = 0
        self._mode: str | None = None
        self._rank = request.rank
        self._has_one_rank = True

    def on_event(self, event: Event) -> None:
        """Count an event. Called from the engine's thread."""
        match event:
            case TokenEvent():
                self._on_token(event)
            case Finished():
                self._mode = event.mode.value
                usage = event.usage
                self._drain_rate.ended(usage.total_s - usage.queue_s)
                before_s = self._started_at - self._arrived_at
                total_s, queue_s = before_s + usage.total_s, before_s + usage.queue_s
                self._metrics.completed(self._request.adapter, self._rank, total_s=total_s, queue_s=queue_s)
                if self._request.adapter is not None and self._has_one_rank:
                    self._latencies.add(self._request.adapter, self._rank, usage)
                self._end("ok", finished=event)
            case Aborted():
                self._end("aborted")
            case Failed(error=DeadlinePassed()):
                self._end("timeout", error=str(event.error))
            case Failed(error=SlowReader()):
                self._end("aborted", error=str(event.error))
            case Failed():
                self._end("failed", error=str(event.error))

    def _on_token(self, event: TokenEvent) -> None:
        now = time.monotonic()
        adapter, rank = self._request.adapter, event.rank
        if rank != self._rank:
            self._metrics.rank_changed(self._rank, rank)
            self._rank = rank
            self._has_one_rank = False
        if self._last_token_at is None:
            self._first_token_at = now
            self._metrics.first_token(adapter, rank, now - self._arrived_at)
        else:
            self._metrics.token_gap(adapter, rank, now - self._last_token_at)
        self._last_token_at = now
        self._tokens += 1
        self._mode = event.mode.value

    def _end(self, outcome: str, error: str | None = None, finished: Finished | None = None) -> None:
        request = self._request
        seconds = time.monotonic() - self._started_at
        self._metrics.ended(request.adapter, self._rank, self._mode, outcome)
        self._metrics.generated(self._tokens)
        line = entry(
            "request",
            request_id=request.request_id,
            outcome=outcome,
            key=request.key or None,
            adapter=request.adapter,
            rank=self._rank,
            reason=request.reason,
            mode=self._mode,
            prompt_tokens=request.prompt_tokens,
            generated_tokens=self._tokens,
            seconds=seconds,
            error=error,
            trace_id=self._trace.trace_id if self._trace else None,
        )
        (logger.error if outcome == "failed" else logger.info)(line)
        if self._trace is not None:
            self._add_span(self._trace, outcome, seconds, finished)

    def _add_span(self, trace: RequestTrace, outcome: str, seconds: float, finished: Finished | None) -> None:
        request = self._request
        attributes: dict[str, str | int | tuple[str, ...] | None] = {
            "dylora.adapter": request.adapter or BASE_LABEL,
            "dylora.rank": self._rank,
            "dylora.rank_reason": request.reason,
            "dylora.mode": self._mode,
            "dylora.outcome": outcome,
            "gen_ai.usage.input_tokens": request.prompt_tokens,
            "gen_ai.usage.output_tokens": self._tokens,
            "gen_ai.response.finish_reasons": (finished.reason.value,) if finished else None,
        }
        known = {name: value for name, value in attributes.items() if value is not None}
        trace.add("generate", seconds, known, self._phases(seconds, finished), is_error=outcome in ("failed", "timeout"))

    def _phases(self, seconds: float, finished: Finished | None) -> list[Phase]:
        """Queue, prefill and decode; of a request that was cut off, what is known."""
        if finished is not None:
            usage = finished.usage
            return [
                Phase("queue", 0, usage.queue_s),
                Phase("prefill", usage.queue_s, usage.time_to_first_token_s),
                Phase("decode", usage.time_to_first_token_s, usage.total_s),
            ]
        if self._first_token_at is not None:
            return [Phase("decode", self._first_token_at - self._started_at, seconds)]
        return []
