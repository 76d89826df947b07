"""Ends the generation of a client that went away while nothing was being sent to it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from starlette.types import Receive


class Closable(Protocol):
    """What ends early when its client is gone."""

    def close(self) -> None:
        """End now, if it has not ended."""


@asynccontextmanager
async def closing_on_disconnect(receive: Receive, events: Closable) -> AsyncIterator[None]:
    """Close the events as soon as the client disconnects inside the block; the engine then answers with Aborted."""
    watcher = asyncio.create_task(_watch(receive, events))
    try:
        yield
    finally:
        watcher.cancel()


async def _watch(receive: Receive, events: Closable) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    events.close()
