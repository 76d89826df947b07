"""How long requests took lately, by adapter and rank."""

import math
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock

from service.core import Usage

WINDOW = 1000
"""Requests of one adapter and rank that percentiles are over: the last ones."""
_MAX_PAIRS = 4096
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Percentiles:
    """In milliseconds, by the nearest rank: each is a time that a request really took."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Percentiles | None":
        """None where there is nothing."""
        ordered = sorted(seconds)
        if not ordered:
            return None
        return cls(*(1000 * ordered[-(-len(ordered) * percent // 100) - 1] for percent in _PERCENTILES))


@dataclass(frozen=True)
class Measured:
    """What requests of one adapter and rank took.

    Attributes:
        requests: how many ended well since the adapter came, or the server started.
        inter_token: of each request the mean time between its tokens.
    """

    requests: int
    total: Percentiles | None
    time_to_first_token: Percentiles | None
    inter_token: Percentiles | None


NOTHING = Measured(0, None, None, None)


@dataclass
class _Pair:
    """What requests of one adapter and rank took.

    Attributes:
        requests: all that ended well.
        seconds: of the last `WINDOW` of them, three numbers each: whole, first token, mean between tokens or NaN. An array,
            because there may be millions: objects would take ten times as much.
    """

    requests: int = 0
    seconds: "array[float]" = field(default_factory=lambda: array("d"))

    def add(self, usage: Usage) -> None:
        later = usage.generated_tokens - 1
        gap_s = (usage.total_s - usage.time_to_first_token_s) / later if later else math.nan
        place = 3 * (self.requests % WINDOW)
        self.seconds[place : place + 3] = array("d", (usage.total_s, usage.time_to_first_token_s, gap_s))
        self.requests += 1


class Latencies:
    """Remembers the times of the last requests of each adapter and rank. Thread-safe; bounded.

    Past a number of pairs the one that was longest not asked for is forgotten.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._pairs: OrderedDict[tuple[str, int], _Pair] = OrderedDict()

    def add(self, adapter: str, rank: int, usage: Usage) -> None:
        """A request ended well."""
        key = (adapter, rank)
        with self._lock:
            self._pairs.setdefault(key, _Pair()).add(usage)
            self._pairs.move_to_end(key)
            if len(self._pairs) > _MAX_PAIRS:
                self._pairs.popitem(last=False)

    def forget(self, adapter: str) -> None:
        """The adapter is another one now, or gone."""
        with self._lock:
            for key in [key for key in self._pairs if key[0] == adapter]:
                del self._pairs[key]

    def of(self, adapter: str, rank: int) -> Measured:
        """What is known of an adapter at a rank."""
        with self._lock:
            pair = self._pairs.get((adapter, rank))
            if pair is None:
                return NOTHING
            requests, seconds = pair.requests, pair.seconds[:]
        gaps = (gap for gap in seconds[2::3] if not math.isnan(gap))
        return Measured(requests, Percentiles.of(seconds[::3]), Percentiles.of(seconds[1::3]), Percentiles.of(gaps))
