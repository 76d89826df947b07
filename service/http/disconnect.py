"""Ends the generation of a client that went away while nothing was being sent to it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive

from service.http.stream import EventStream


@asynccontextmanager
async def closing_on_disconnect(receive: Receive, events: EventStream) -> AsyncIterator[None]:
    """Close the events as soon as the client disconnects inside the block; the engine then answers with Aborted."""
    watcher = asyncio.create_task(_watch(receive, events))
    try:
        yield
    finally:
        watcher.cancel()


async def _watch(receive: Receive, events: EventStream) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    events.close()
