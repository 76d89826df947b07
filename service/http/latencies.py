"""How long requests took lately, by adapter and rank."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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


class Latencies:
    """Remembers the times of the last requests of each adapter and rank. Thread-safe; bounded.

    Past a number of pairs the one that was longest not asked for is forgotten.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._pairs: OrderedDict[tuple[str, int], tuple[int, deque[Usage]]] = OrderedDict()

    def add(self, adapter: str, rank: int, usage: Usage) -> None:
        """A request ended well."""
        key = (adapter, rank)
        with self._lock:
            count, usages = self._pairs.pop(key, (0, deque(maxlen=WINDOW)))
            usages.append(usage)
            self._pairs[key] = (count + 1, usages)
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
            count, kept = self._pairs.get((adapter, rank), (0, deque[Usage]()))
            usages = list(kept)
        if not usages:
            return NOTHING

        def over(time_s: Callable[[Usage], float], among: list[Usage] = usages) -> Percentiles | None:
            return Percentiles.of(map(time_s, among))

        several = [usage for usage in usages if usage.generated_tokens > 1]
        return Measured(
            count,
            over(lambda usage: usage.total_s),
            over(lambda usage: usage.time_to_first_token_s),
            over(lambda usage: (usage.total_s - usage.time_to_first_token_s) / (usage.generated_tokens - 1), several),
        )
