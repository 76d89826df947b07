"""From the engine's thread to the event loop: the events of one request, as an async iterator."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from service.core import Aborted, EngineProtocol, Event, Failed, Finished, GenerationRequest

TERMINAL = (Finished, Aborted, Failed)


class EventStream:
    """The events of one request, in order, ending with its terminal event. First `submit`, then read inside a block.

    Whoever leaves the block before that (an exception, a cancelled task, a client that went away) aborts the request,
    so that its place in the batch is free before the next step.

    A slow reader holds at most max_new_tokens + 1 small events of its own request and never delays the engine: events
    wait in a plain deque, and the loop is woken once however many have come meanwhile.

    Args:
        on_event: told each event first, in the engine's thread, whether or not anyone still reads. It must not raise.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        request: GenerationRequest,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self._engine = engine
        self._request = request
        self._on_event = on_event
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._is_wake_due = False
        self._has_ended = False

    async def __aenter__(self) -> "EventStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self) -> None:
        """Hand the request to the engine. Raises what EngineProtocol.submit raises; then no event will come."""
        self._engine.submit(self._request, self._sink)

    def close(self) -> None:
        """Abort the request unless it has ended. Idempotent, and safe from any thread."""
        if not self._has_ended:
            self._engine.abort(self._request.request_id)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            event = await self.next()
            yield event
            if isinstance(event, TERMINAL):
                return

    async def next(self) -> Event:
        """The next event. After the terminal one there is none: don't ask."""
        while not self._events:
            self._arrived.clear()
            # The sink may have appended between the check and the clear.
            if self._events:
                break
            await self._arrived.wait()
        return self._events.popleft()

    def _sink(self, event: Event) -> None:
        """Runs in the engine's thread."""
        if isinstance(event, TERMINAL):
            self._has_ended = True
        if self._on_event is not None:
            self._on_event(event)
        self._events.append(event)
        if self._is_wake_due:
            return
        self._is_wake_due = True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            return  # the loop is closed: the server is gone, and nobody reads

    def _wake(self) -> None:
        # Cleared before readers look: an event that comes after this line schedules a wake-up of its own.
        self._is_wake_due = False
        self._arrived.set()
