"""What is in flight, as far as it tells how long the engine's next steps will take: sums that each event changes a little."""

import copy
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from service.rank.ladder import LEVELS, Floats, Ladder, kept_quality

TRAFFIC_S = 2.0
"""How long an arrival counts: short enough to notice a step of load, long enough to tell a rate."""


@dataclass(eq=False, slots=True)
class InFlight:
    """A request from its submission to its end.

    Attributes:
        version: of its adapter; None for the base.
        ladder: the rank that it would have at each price.
        rank: the one that it has.
        prompt_tokens: to be read before its first token.
        new_tokens: the most that it may make.
        due_at, first_due_at: moments by which its last and its first token are due; None where there is no such objective.
        gap_s: the longest step that its inter-token objective allows, if it has one.
        change: how its rank is changed while it runs; None where it keeps the one that it began with.
        generated: tokens that it has made.
        worth: the share of its quality that each price leaves.
        has_objectives: whether anything is due.
    """

    version: str | None
    ladder: Ladder
    rank: int
    prompt_tokens: int
    new_tokens: int
    due_at: float | None = None
    first_due_at: float | None = None
    gap_s: float | None = None
    change: Callable[[int], None] | None = None
    generated: int = field(default=0, init=False)
    worth: Floats = field(init=False)
    has_objectives: bool = field(init=False)

    def __post_init__(self) -> None:
        self.worth = kept_quality(self.ladder)
        self.has_objectives = self.due_at is not None or self.first_due_at is not None or self.gap_s is not None


class Traffic(NamedTuple):
    """The work that arrived lately, as rates that fade within `TRAFFIC_S`.

    Attributes:
        new_tokens_per_s: the most that the requests that arrive may make.
        prompt_tokens_per_s: of their prompts.
        requests_per_s: their number.
        ranks: their mean rank at each price.
    """

    new_tokens_per_s: float
    prompt_tokens_per_s: float
    requests_per_s: float
    ranks: Floats

    @property
    def new_tokens(self) -> float:
        """Of each request, in the mean."""
        return self.new_tokens_per_s / self.requests_per_s if self.requests_per_s else 0.0


class _Users:
    """The requests in flight of one adapter."""

    def __init__(self) -> None:
        self.ladders: Counter[Ladder] = Counter()
        self.columns = np.zeros(LEVELS)  # the largest rank among them, at each price

    def copy(self) -> "_Users":
        other = _Users()
        other.ladders, other.columns = self.ladders.copy(), self.columns
        return other

    def count(self, ladder: Ladder, one: int) -> None:
        self.ladders[ladder] += one
        if not self.ladders[ladder]:
            del self.ladders[ladder]
        if (one > 0 and self.ladders[ladder] == 1) or (one < 0 and ladder not in self.ladders):
            self.columns = np.max(list(self.ladders), axis=0) if self.ladders else np.zeros(LEVELS)


class LoadBook:
    """Keeps count of the requests in flight. Hold `lock` around reading several of its numbers; every call takes microseconds.

    Attributes:
        decoding: requests that have made a token.
        waiting: requests that have not: in the queue, or being read.
        waiting_prompt_tokens: prompt tokens of the waiting.
        context_tokens: tokens, prompts included, of the decoding.
        columns: adapter columns that all would use at each price: the sum over adapters of the largest rank.
        row_ranks: sum of the ranks of all at each price; like the columns it is replaced, never changed in place.
        requests: all in flight, in the order in which they came.
        judged: number of those that have objectives.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.decoding = self.waiting = self.waiting_prompt_tokens = 0
        self.context_tokens = self.judged = 0
        self.columns, self.row_ranks = np.zeros(LEVELS), np.zeros(LEVELS)
        self.requests: dict[InFlight, None] = {}
        self._users: dict[str | None, _Users] = {}
        self._ranks: Counter[tuple[str | None, int]] = Counter()
        self._new_tokens_per_s = self._prompt_tokens_per_s = self._requests_per_s = 0.0
        self._mean_ranks = np.zeros(LEVELS)
        self._arrived_at: float | None = None

    @property
    def in_flight(self) -> int:
        """All requests."""
        return self.decoding + self.waiting

    @property
    def adapters(self) -> int:
        """Distinct adapters in flight."""
        return len(self._users) - (None in self._users)

    @property
    def only_pair(self) -> tuple[str | None, int] | None:
        """Adapter and rank that all in flight share, if they do."""
        return next(iter(self._ranks)) if len(self._ranks) == 1 else None

    @property
    def movable(self) -> list[InFlight]:
        """Those whose rank may be changed."""
        return [each for each in self.requests if each.change is not None]

    def columns_of(self, version: str | None) -> Floats | None:
        """Columns that the requests in flight of an adapter would use at each price; None where there are none."""
        users = self._users.get(version)
        return None if users is None else users.columns

    def add(self, request: InFlight, now: float) -> None:
        """A request is submitted at a moment of the clock that `due_at` is of."""
        with self.lock:
            fade = self._fade(now)
            self._new_tokens_per_s = fade * self._new_tokens_per_s + request.new_tokens / TRAFFIC_S
            self._requests_per_s = fade * self._requests_per_s + 1 / TRAFFIC_S
            self._prompt_tokens_per_s = fade * self._prompt_tokens_per_s + request.prompt_tokens / TRAFFIC_S
            self._mean_ranks = self._mean_ranks + max(0.1, 1 - fade) * (np.array(request.ladder) - self._mean_ranks)
            self._arrived_at = now
            self._enter(request)

    def plus(self, requests: Iterable[InFlight]) -> "LoadBook":
        """What it would be if some requests more had just been submitted, which this one never hears of. Hold `lock`."""
        other = copy.copy(self)
        other.requests, other._ranks = dict(self.requests), self._ranks.copy()
        other._users = {version: users.copy() for version, users in self._users.items()}
        for request in requests:
            other._enter(request)
        return other

    def token(self, request: InFlight) -> None:
        """It made a token."""
        with self.lock:
            if not request.generated:
                self.waiting -= 1
                self.waiting_prompt_tokens -= request.prompt_tokens
                self.decoding += 1
                self.context_tokens += request.prompt_tokens
            request.generated += 1
            self.context_tokens += 1

    def remove(self, request: InFlight) -> None:
        """It ended, in whichever way."""
        with self.lock:
            if request.generated:
                self.decoding -= 1
                self.context_tokens -= request.prompt_tokens + request.generated
            else:
                self.waiting -= 1
                self.waiting_prompt_tokens -= request.prompt_tokens
            self._count(request, -1)
            del self.requests[request]

    def change_rank(self, request: InFlight, rank: int) -> None:
        """Let it go on at another rank, unless it has ended."""
        with self.lock:
            if request not in self.requests or request.change is None:
                return
            self._count_rank(request, -1)
            request.rank = rank
            self._count_rank(request, 1)
        request.change(rank)

    def traffic(self, now: float) -> Traffic:
        """What arrived lately."""
        fade = self._fade(now)
        return Traffic(
            fade * self._new_tokens_per_s, fade * self._prompt_tokens_per_s, fade * self._requests_per_s, self._mean_ranks
        )

    def _fade(self, now: float) -> float:
        return 1.0 if self._arrived_at is None else math.exp(-max(0.0, now - self._arrived_at) / TRAFFIC_S)

    def _enter(self, request: InFlight) -> None:
        self.waiting += 1
        self.waiting_prompt_tokens += request.prompt_tokens
        self._count(request, 1)
        self.requests[request] = None

    def _count(self, request: InFlight, one: int) -> None:
        self.judged += one * request.has_objectives
        self.row_ranks = self.row_ranks + one * np.array(request.ladder)
        users = self._users.setdefault(request.version, _Users())
        others = self.columns - users.columns
        users.count(request.ladder, one)
        self.columns = others + users.columns
        if not users.ladders:
            del self._users[request.version]
        self._count_rank(request, one)

    def _count_rank(self, request: InFlight, one: int) -> None:
        key = request.version, request.rank
        self._ranks[key] += one
        if not self._ranks[key]:
            del self._ranks[key]
