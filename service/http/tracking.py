"""What is counted and logged of each request, at its terminal event: exactly once, read or not."""

import time
from dataclasses import dataclass

from service.core import Aborted, Event, Failed, Finished, TokenEvent
from service.errors import DeadlinePassed, SlowReader
from service.http.limits import DrainRate
from service.http.metrics import Metrics
from service.log import entry, logger


@dataclass(frozen=True)
class TrackedRequest:
    """What a request is counted under; `rank` is 0 without adapter, `key` is the name of the API key, "" without."""

    request_id: str
    adapter: str | None
    rank: int
    prompt_tokens: int
    key: str = ""


class RequestTracker:
    """Follows one request from the engine's thread."""

    def __init__(self, metrics: Metrics, request: TrackedRequest, drain_rate: DrainRate) -> None:
        self._metrics = metrics
        self._drain_rate = drain_rate
        self._request = request
        self._started_at = time.perf_counter()
        self._last_token_at: float | None = None
        self._tokens = 0
        self._mode: str | None = None

    def on_event(self, event: Event) -> None:
        """Count an event. Called from the engine's thread."""
        match event:
            case TokenEvent():
                self._on_token(event)
            case Finished():
                self._mode = event.mode.value
                usage = event.usage
                self._drain_rate.ended(usage.total_s - usage.queue_s)
                adapter, rank = self._request.adapter, self._request.rank
                self._metrics.completed(adapter, rank, total_s=usage.total_s, queue_s=usage.queue_s)
                self._end("ok")
            case Aborted():
                self._end("aborted")
            case Failed(error=DeadlinePassed()):
                self._end("timeout", error=str(event.error))
            case Failed(error=SlowReader()):
                self._end("aborted", error=str(event.error))
            case Failed():
                self._end("failed", error=str(event.error))

    def _on_token(self, event: TokenEvent) -> None:
        now = time.perf_counter()
        adapter, rank = self._request.adapter, self._request.rank
        if self._last_token_at is None:
            self._metrics.first_token(adapter, rank, now - self._started_at)
        else:
            self._metrics.token_gap(adapter, rank, now - self._last_token_at)
        self._last_token_at = now
        self._tokens += 1
        self._mode = event.mode.value

    def _end(self, outcome: str, error: str | None = None) -> None:
        request = self._request
        self._metrics.ended(request.adapter, request.rank, self._mode, outcome)
        self._metrics.tokens(prompt=request.prompt_tokens, generated=self._tokens)
        line = entry(
            "request",
            request_id=request.request_id,
            outcome=outcome,
            key=request.key or None,
            adapter=request.adapter,
            rank=request.rank,
            mode=self._mode,
            prompt_tokens=request.prompt_tokens,
            generated_tokens=self._tokens,
            seconds=time.perf_counter() - self._started_at,
            error=error,
        )
        (logger.error if outcome == "failed" else logger.info)(line)
