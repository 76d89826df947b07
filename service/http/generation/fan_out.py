"""Several sequences of one prompt: each is a request of its own to the engine, which batches them and reuses the prompt."""

import asyncio
import hashlib
import secrets
from collections import deque
from collections.abc import Sequence

from service.core import Event
from service.errors import ServiceError
from service.http.generation.stream import TERMINAL, EventStream, submit_all

_SEED_BITS = 53
"""What every JSON reader keeps exactly."""


def drawn_seed() -> int:
    """A seed where the client leaves it to us."""
    return secrets.randbits(_SEED_BITS)


def sequence_seed(seed: int, index: int) -> int:
    """The seed of the `index`-th sequence of a request with this seed.

    The first one's is the request's own, so that it is the answer to a request for one. The others' are the low 53 bits of
    BLAKE2b-64 over "seed:index", read as a big-endian number. A sequence can be had alone with the seed that its details tell.
    """
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) & ((1 << _SEED_BITS) - 1)


class FanOut:
    """The event streams of one request's sequences. First `submit`, then read, and `close` in any case.

    Args:
        arrived: what all the streams were given, so that they can be read together.
    """

    def __init__(self, streams: Sequence[EventStream], arrived: asyncio.Event) -> None:
        self.streams = tuple(streams)
        self._arrived = arrived
        self._open = deque(range(len(self.streams)))

    def submit(self) -> None:
        """Hand all sequences to the engine, or none."""
        submit_all(self.streams)

    async def next(self) -> tuple[int, Event]:
        """The next event of any sequence, with its number; in turn where several have one.

        Each sequence ends with its terminal event. After the last of these there is none: don't ask.
        """
        while True:
            # Cleared before looking: an event that comes after the look sets it again.
            self._arrived.clear()
            for _ in range(len(self._open)):
                number = self._open[0]
                self._open.rotate(-1)
                event = self.streams[number].poll()
                if event is not None:
                    if isinstance(event, TERMINAL):
                        self._open.remove(number)
                    return number, event
            await self._arrived.wait()

    def cut_at(self, moment: float, error: ServiceError) -> None:
        """Cut the sequences off at a moment of the event loop's clock that have not ended by then."""
        for stream in self.streams:
            stream.cut_at(moment, error)

    def close(self) -> None:
        """Abort the sequences that have not ended. Idempotent; from the event loop."""
        for stream in self.streams:
            stream.close()
