"""How much is allowed, and when to come back: arithmetic on clocks, without HTTP."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from threading import Lock

from service.errors import InvalidRequest

Clock = Callable[[], float]
"""Seconds that only grow, as time.monotonic gives them."""

TIMEOUT_HEADERS = ("x-request-timeout-ms", "x-envoy-expected-rq-timeout-ms")
"""How long the client waits for the whole answer, in milliseconds. The second is what an Envoy in front of us sets:
https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_filters/router_filter"""

MAX_RETRY_AFTER_S = 60
_DRAIN_WINDOW_S = 30.0


class TokenBucket:
    """Lets through `per_minute` requests a minute: a full bucket at first, refilled evenly, never above full.

    Within any one minute at most twice that many pass: a full bucket and what flows in meanwhile.
    """

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled_at = clock()

    def take(self) -> float:
        """Take one: 0 if there was one, else the seconds until there is, and nothing is taken."""
        now = self._clock()
        per_second = self.per_minute / 60
        self._level = min(self.per_minute, self._level + (now - self._filled_at) * per_second)
        self._filled_at = now
        if self._level < 1:
            return (1 - self._level) / per_second
        self._level -= 1
        return 0.0


class DrainRate:
    """How fast requests end, over the last half minute; from it follows when a full queue has room. Thread-safe."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._started_at = clock()
        self._ends: deque[float] = deque()
        self._lock = Lock()

    def ended(self) -> None:
        """A request reached its end."""
        with self._lock:
            self._ends.append(self._clock())
            self._forget()

    def retry_after_s(self, waiting: int) -> int:
        """Whole seconds in which those that wait now will have been taken, if requests go on ending at this rate.

        One second where the server is too young to tell.
        """
        with self._lock:
            self._forget()
            ends = len(self._ends)
            span_s = min(_DRAIN_WINDOW_S, self._clock() - self._started_at)
        # Where nothing ended, the first end is still to come: the span is the best that is known of how long that takes.
        return whole_seconds(max(waiting, 1) * span_s / max(ends, 1))

    def _forget(self) -> None:
        oldest = self._clock() - _DRAIN_WINDOW_S
        while self._ends and self._ends[0] < oldest:
            self._ends.popleft()


def whole_seconds(seconds: float) -> int:
    """For a Retry-After header: rounded up, at least 1 and at most a minute."""
    return max(1, min(MAX_RETRY_AFTER_S, math.ceil(seconds)))


def time_limit_s(headers: Mapping[str, str], longest_s: float) -> float:
    """How long a request may take: the least of what its headers and the server say.

    Args:
        headers: names in lower case.
        longest_s: the server's own limit.

    Raises:
        InvalidRequest: a header is no number of milliseconds.
    """
    limits = [longest_s]
    for name in TIMEOUT_HEADERS:
        text = headers.get(name)
        if text is None:
            continue
        if not (text.isascii() and text.isdigit() and len(text) <= 12 and int(text) >= 1):
            raise InvalidRequest(name, f"{text[:80]!r} is not legal: whole milliseconds, at least 1")
        limits.append(int(text) / 1000)
    return min(limits)


def body_time_s(received_bytes: int, first_s: float, min_bytes_per_s: float) -> float:
    """How long after its headers a body may take once so much of it has come, by the rule of Apache's mod_reqtimeout:
    some time for any body, and more for each byte that came, so that large uploads pass and trickles don't.
    """
    return first_s + received_bytes / min_bytes_per_s
