"""What a generating request brings along beside its body."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from service.errors import DeadlinePassed
from service.http.limits import time_limit_s
from service.http.tenants import Admission
from service.keys import ApiKey


@dataclass(frozen=True)
class Arrival:
    """One request as it came in.

    Attributes:
        headers: names in lower case.
        request_id: as the client sees it.
        caller: whose key it came with.
        admission: what it counts as, of what the key may have in flight.
        arrived_at: moment on the event loop's clock.
        is_streamed: tokens are sent as they are made, so that a client may fall behind.
    """

    headers: Mapping[str, str]
    request_id: str
    caller: ApiKey
    admission: Admission
    arrived_at: float
    is_streamed: bool = False

    def deadline(self, longest_s: float) -> "Deadline":
        """When the request must be complete. Raises InvalidRequest for a header that is no time."""
        limit_s = time_limit_s(self.headers, longest_s)
        return Deadline(self.arrived_at + limit_s, limit_s)


@dataclass(frozen=True)
class Deadline:
    """A moment on the event loop's clock, and how long that is after the request's arrival."""

    at: float
    limit_s: float

    def check(self) -> None:
        """Raise DeadlinePassed if it has."""
        if asyncio.get_running_loop().time() >= self.at:
            raise self.error()

    def error(self) -> DeadlinePassed:
        """What the client is told."""
        return DeadlinePassed(self.limit_s)
