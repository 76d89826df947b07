"""Several sequences of one prompt: each is a request of its own to the engine, which batches them and reuses the prompt."""

import hashlib
from collections.abc import Sequence
from types import TracebackType

from service.errors import ServiceError
from service.http.stream import EventStream

_SEED_BITS = 53
"""What every JSON reader keeps exactly."""


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
    """The event streams of one request's sequences. First `submit`, then read inside a block, which ends them all."""

    def __init__(self, streams: Sequence[EventStream]) -> None:
        self.streams = tuple(streams)

    async def __aenter__(self) -> "FanOut":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self) -> None:
        """Hand all sequences to the engine, or none: what one of them raises ends those before it."""
        for number, stream in enumerate(self.streams):
            try:
                stream.submit()
            except BaseException:
                for taken in self.streams[:number]:
                    taken.close()
                raise

    def cut_at(self, moment: float, error: ServiceError) -> None:
        """Cut the sequences off at a moment of the event loop's clock that have not ended by then."""
        for stream in self.streams:
            stream.cut_at(moment, error)

    def close(self) -> None:
        """Abort the sequences that have not ended. Idempotent; from the event loop."""
        for stream in self.streams:
            stream.close()
