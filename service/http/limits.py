"""How much is allowed, and when to come back: arithmetic on clocks, without HTTP."""

import math
import time
from collections.abc import Callable, Mapping

from service.errors import InvalidRequest

Clock = Callable[[], float]
"""Seconds that only grow, as time.monotonic gives them."""

TIMEOUT_HEADERS = ("x-request-timeout-ms", "x-envoy-expected-rq-timeout-ms")
"""How long the client waits for the whole answer, in milliseconds. The second is what an Envoy in front of us sets:
https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_filters/router_filter"""

MAX_RETRY_AFTER_S = 60
_NEWEST_WEIGHT = 0.1


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
    """How fast generations end, from how long they took lately: n that run, each `mean_s` long, end at n / mean_s a second
    (Little's law). Unlike a count of ends per time it is not misled by a server that was idle until a moment ago.
    """

    def __init__(self) -> None:
        self._mean_s: float | None = None  # written by the engine's thread alone

    def ended(self, running_s: float) -> None:
        """A generation is complete; it ran for so long, its time in the queue apart."""
        mean_s = running_s if self._mean_s is None else self._mean_s
        self._mean_s = mean_s + _NEWEST_WEIGHT * (running_s - mean_s)

    def retry_after_s(self, running: int, waiting: int) -> int:
        """Whole seconds in which those that wait now will have been taken. One where nothing has ended yet."""
        if self._mean_s is None:
            return 1
        return whole_seconds(max(waiting, 1) * self._mean_s / max(running, 1))


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
