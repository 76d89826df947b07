"""Shadow scoring: some answers are scored again at the full rank while the server is idle, to see what a lower rank changes.

Of an answer that was generated at a rank, the engine is asked for the log-probability of each of its tokens at the adapter's
full rank. The mean over its tokens of `log p_rank - log p_full` is an estimate, in nats per token, of the Kullback-Leibler
divergence of the full rank from the rank that served; unbiased where tokens were drawn at temperature 1, and of greedy answers
the same quantity along the path that they took.

No request waits for it: an answer is scored only while nothing is in flight, and the first request that arrives ends the
scoring before the engine's next step. What was not finished is tried again.
"""

import random
import secrets
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from service.core import AdapterChoice, EngineProtocol, Event, Finished, GenerationRequest, SamplingParams, Token, TokenEvent
from service.errors import ServiceError
from service.http.metrics import Metrics
from service.log import entry, logger

MAX_WAITING = 64
"""Answers that are kept to be scored; beyond them the oldest is dropped."""
_SCORING = SamplingParams(max_new_tokens=1, prompt_logprobs=True, ignore_eos=True)


@dataclass(frozen=True)
class Answer:
    """A generated answer that may be scored.

    Attributes:
        adapter: its name, for the series.
        rank: that it was generated at.
        full: the adapter at its full rank.
        prompt_ids, token_ids: prompt and answer.
        logprobs: of the answer's tokens, at `rank`.
    """

    adapter: str
    rank: int
    full: AdapterChoice
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class ShadowScorer:
    """Collects answers and scores them one at a time. Thread-safe.

    Args:
        share: of the answers below their full rank; 0 scores none.
    """

    def __init__(self, engine: EngineProtocol, metrics: Metrics, share: float) -> None:
        self._engine = engine
        self._metrics = metrics
        self._share = share
        self._lock = threading.Lock()
        self._waiting: deque[Answer] = deque(maxlen=MAX_WAITING)
        self._in_flight = 0
        self._scoring: str | None = None
        """Id of the request that scores."""

    def follow(
        self,
        adapter: str | None,
        prompt_ids: tuple[int, ...],
        choice: AdapterChoice | None,
        full: AdapterChoice | None,
    ) -> "Followed":
        """One more request, which may be kept to be scored.

        Args:
            adapter, choice: its adapter and rank; None for the base.
            full: the adapter at its full rank.
        """
        is_kept = choice is not None and choice != full and random.random() < self._share
        if adapter is None or choice is None or full is None or not is_kept:
            return Followed(self, None)
        return Followed(self, Answer(adapter, choice.rank, full, prompt_ids, (), ()))

    def begin(self) -> None:
        """A request is submitted next; whatever is being scored makes room."""
        with self._lock:
            self._in_flight += 1
            scoring = self._scoring
        if scoring is not None:
            self._engine.abort(scoring)

    def end(self, answer: Answer | None) -> None:
        """A request ended, or was not taken; with its answer if that is to be scored."""
        with self._lock:
            self._in_flight -= 1
            if answer is not None:
                self._waiting.append(answer)
        self._score_next()

    def _score_next(self) -> None:
        with self._lock:
            if self._in_flight or self._scoring is not None or not self._waiting:
                return
            answer = self._waiting.popleft()
            self._scoring = request_id = f"shadow-{secrets.token_hex(8)}"
        request = GenerationRequest(request_id, answer.prompt_ids + answer.token_ids, _SCORING, answer.full)
        try:
            self._engine.submit(request, lambda event: self._on_event(answer, event))
        except ServiceError:  # unloaded meanwhile, or the server stops
            with self._lock:
                self._scoring = None

    def _on_event(self, answer: Answer, event: Event) -> None:
        if isinstance(event, TokenEvent):
            return
        with self._lock:
            self._scoring = None
            was_disturbed = not isinstance(event, Finished) and self._in_flight > 0
            if was_disturbed:
                self._waiting.appendleft(answer)
        if isinstance(event, Finished):
            scored = [token.logprob or 0.0 for token in event.prompt[len(answer.prompt_ids) :]]
            divergence = mean_difference(answer.logprobs, scored)
            self._metrics.shadow_scored(answer.adapter, answer.rank, divergence)
            logger.debug(entry("shadow", adapter=answer.adapter, rank=answer.rank, divergence=divergence))
        self._score_next()


class Followed:
    """A request in flight. Its events come from the engine's thread.

    Args:
        answer: without tokens yet, if it is to be scored.
    """

    def __init__(self, scorer: ShadowScorer, answer: Answer | None) -> None:
        self._scorer = scorer
        self._answer = answer
        self._tokens: list[Token] = []

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Around its submission: it counts as in flight from here on, unless the block raises."""
        self._scorer.begin()
        try:
            yield
        except BaseException:
            self._scorer.end(None)
            raise

    def on_event(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, TokenEvent):
            if self._answer is not None and event.rank != self._answer.rank:
                self._answer = None  # its rank was changed: it tells nothing of either
            if self._answer is not None:
                self._tokens.append(event.token)
            return
        answer = None
        if self._answer is not None and self._tokens and isinstance(event, Finished):
            ids, logprobs = tuple(token.id for token in self._tokens), tuple(token.logprob for token in self._tokens)
            answer = replace(self._answer, token_ids=ids, logprobs=logprobs)
        self._scorer.end(answer)


def mean_difference(served: Sequence[float], full: Sequence[float]) -> float:
    """Mean of `served - full` over the tokens; at least one."""
    return sum(one - other for one, other in zip(served, full, strict=True)) / len(served)
