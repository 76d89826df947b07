"""What is in flight, as far as it tells how long the engine's next steps will take."""

import math
import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple

TRAFFIC_S = 5.0
"""How long an arrival counts: short enough to notice a step of load, long enough to tell a rate."""
_MOST_RECENT = 64


@dataclass(eq=False)
class InFlight:
    """A request from its submission to its end.

    Attributes:
        version: of its adapter; None for the base.
        new_tokens: the most that it may make.
        due_at: moment by which its last token is due; None where there is no such objective.
        gap_s: the longest step that its inter-token objective allows, if it has one.
    """

    version: str | None
    rank: int
    prompt_tokens: int
    new_tokens: int
    due_at: float | None = None
    gap_s: float | None = None
    generated: int = field(default=0, init=False)

    def step_limit_s(self, now: float) -> float | None:
        """The longest that its steps may take from now on, in the mean, if it is to keep its objectives."""
        if self.due_at is None:
            return self.gap_s
        per_step = (self.due_at - now) / max(1, self.new_tokens - self.generated)
        return per_step if self.gap_s is None else min(per_step, self.gap_s)


class Traffic(NamedTuple):
    """The work that arrived lately, as rates that fade within `TRAFFIC_S`, and how many adapters share it.

    Attributes:
        new_tokens_per_s: the most that the requests that arrive may make.
        prompt_tokens_per_s: of their prompts.
        adapters: distinct ones among the last requests, as many as are in flight and four at least.
    """

    new_tokens_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    adapters: int = 0


NO_TRAFFIC = Traffic()


@dataclass(frozen=True)
class Load:
    """The requests in flight, summed up for one that arrives.

    Attributes:
        decoding: requests that have made a token.
        waiting: requests that have not: in the queue, or being read.
        waiting_prompt_tokens: prompt tokens of the waiting.
        context_tokens: tokens, prompts included, of the decoding.
        remaining_tokens: the most that all may still make.
        columns: adapter columns that all use: the sum over adapters of the largest rank.
        row_ranks: sum of the ranks of all.
        adapters: distinct ones.
        own_rank: largest rank in flight of the adapter of the one that arrives; 0 for none.
        only_rank: its rank where all in flight are of that adapter and of one rank; None otherwise.
        step_limits_s: longest steps that requests with objectives can bear.
        traffic: what arrived lately.
    """

    decoding: int = 0
    waiting: int = 0
    waiting_prompt_tokens: int = 0
    context_tokens: int = 0
    remaining_tokens: int = 0
    columns: int = 0
    row_ranks: int = 0
    adapters: int = 0
    own_rank: int = 0
    only_rank: int | None = None
    step_limits_s: tuple[float, ...] = ()
    traffic: Traffic = NO_TRAFFIC

    @property
    def in_flight(self) -> int:
        """All requests."""
        return self.decoding + self.waiting


class LoadBook:
    """Keeps count of the requests in flight. Thread-safe; every call takes microseconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranks: dict[str | None, Counter[int]] = {}
        self._with_slo: set[InFlight] = set()
        self._recent: deque[str | None] = deque(maxlen=_MOST_RECENT)
        self._new_tokens_per_s = self._prompt_tokens_per_s = 0.0
        self._arrived_at: float | None = None
        self._decoding = self._waiting = self._waiting_prompt_tokens = 0
        self._context_tokens = self._remaining_tokens = self._columns = self._row_ranks = 0

    def add(self, request: InFlight, now: float) -> None:
        """A request is submitted at a moment of the clock that `due_at` is of."""
        with self._lock:
            fade = self._fade(now)
            self._new_tokens_per_s = fade * self._new_tokens_per_s + request.new_tokens / TRAFFIC_S
            self._prompt_tokens_per_s = fade * self._prompt_tokens_per_s + request.prompt_tokens / TRAFFIC_S
            self._arrived_at = now
            self._recent.append(request.version)
            self._waiting += 1
            self._waiting_prompt_tokens += request.prompt_tokens
            self._remaining_tokens += request.new_tokens
            self._count(request, 1)
            if request.due_at is not None or request.gap_s is not None:
                self._with_slo.add(request)

    def token(self, request: InFlight) -> None:
        """It made a token."""
        with self._lock:
            if not request.generated:
                self._waiting -= 1
                self._waiting_prompt_tokens -= request.prompt_tokens
                self._decoding += 1
                self._context_tokens += request.prompt_tokens
            request.generated += 1
            self._context_tokens += 1
            self._remaining_tokens -= 1

    def remove(self, request: InFlight) -> None:
        """It ended, in whichever way."""
        with self._lock:
            if request.generated:
                self._decoding -= 1
                self._context_tokens -= request.prompt_tokens + request.generated
            else:
                self._waiting -= 1
                self._waiting_prompt_tokens -= request.prompt_tokens
            self._remaining_tokens -= request.new_tokens - request.generated
            self._count(request, -1)
            self._with_slo.discard(request)

    def view(self, version: str | None, now: float) -> Load:
        """The load as a request of this adapter finds it.

        Args:
            now: moment of the clock that `due_at` is of.
        """
        with self._lock:
            own = self._ranks.get(version)
            limits = [request.step_limit_s(now) for request in self._with_slo]
            fade = self._fade(now)
            last = list(self._recent)[-max(4, self._decoding + self._waiting) :]
            adapters = len({each for each in last if each is not None})
            traffic = Traffic(fade * self._new_tokens_per_s, fade * self._prompt_tokens_per_s, adapters)
            return Load(
                decoding=self._decoding,
                waiting=self._waiting,
                waiting_prompt_tokens=self._waiting_prompt_tokens,
                context_tokens=self._context_tokens,
                remaining_tokens=self._remaining_tokens,
                columns=self._columns,
                row_ranks=self._row_ranks,
                adapters=len(self._ranks) - (None in self._ranks),
                own_rank=max(own) if own else 0,
                only_rank=next(iter(own)) if own and len(own) == len(self._ranks) == 1 else None,
                step_limits_s=tuple(limit for limit in limits if limit is not None),
                traffic=traffic,
            )

    def _fade(self, now: float) -> float:
        return 1.0 if self._arrived_at is None else math.exp(-max(0.0, now - self._arrived_at) / TRAFFIC_S)

    def _count(self, request: InFlight, one: int) -> None:
        self._row_ranks += one * request.rank
        ranks = self._ranks.setdefault(request.version, Counter())
        before = max(ranks, default=0)
        ranks[request.rank] += one
        if not ranks[request.rank]:
            del ranks[request.rank]
        if not ranks:
            del self._ranks[request.version]
        self._columns += max(ranks, default=0) - before
