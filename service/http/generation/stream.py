"""From the engine's thread to the event loop: the events of one request, as an async iterator."""

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

from service.core import Aborted, EngineProtocol, Event, Failed, Finished, GenerationRequest
from service.errors import ServiceError, SlowReader

TERMINAL = (Finished, Aborted, Failed)


class EventStream:
    """The events of one request, in order, ending with its terminal event. First `submit`, then read, and `close` in any case.

    Where reading ends before that event (an exception, a cancelled task, a client that went away), `close` aborts the
    request, so that its place in the batch is free before the next step.

    A reader never delays the engine: events wait in a plain deque, and the loop is woken once however many have come
    meanwhile, of all streams. One that falls too far behind is cut off.

    Args:
        on_event: told each event first, in the engine's thread, whether or not anyone still reads. It must not raise.
        max_unread: events that may wait for the reader; None where the reader is the server itself.
        arrived: set in the event loop when there is something to read; streams that are read together share one.
        submitting: entered around the submission; its block raises if the engine does not take the request.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        request: GenerationRequest,
        on_event: Callable[[Event], None] | None = None,
        max_unread: int | None = None,
        arrived: asyncio.Event | None = None,
        submitting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._engine = engine
        self._request = request
        self._on_event = on_event
        self._max_unread = max_unread
        self._submitting = submitting
        self._cut_by: ServiceError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._events: deque[Event] = deque()
        self._arrived = arrived or asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._bell = _bell_of(self._loop)
        self._is_wake_due = False
        self._has_ended = False

    def submit(self) -> None:
        """Hand the request to the engine. Raises what EngineProtocol.submit raises; then no event will come."""
        submit_all([self])

    def cut_at(self, moment: float, error: ServiceError) -> None:
        """Cut the request off at a moment of the event loop's clock, unless it has ended by then."""
        self._timer = self._loop.call_at(moment, self.cut, error)

    def cut(self, error: ServiceError) -> None:
        """End the request with an error: the engine aborts it, and the reader hears of the error next, at once. Idempotent.

        What was not read yet is never delivered. The observer hears of the same error when the engine has aborted.
        """
        if self._has_ended or self._cut_by is not None:
            return
        self._cut_by = error
        self._engine.abort(self._request.request_id)
        self._wake_reader()

    def close(self) -> None:
        """Abort the request unless it has ended. Idempotent; from the event loop."""
        if self._timer is not None:
            self._timer.cancel()
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
        while True:
            # Cleared before looking: an event that comes after the look sets it again.
            self._arrived.clear()
            event = self.poll()
            if event is not None:
                return event
            await self._arrived.wait()

    def poll(self) -> Event | None:
        """The next event if it is there. After the terminal one there is none: don't ask."""
        if self._cut_by is not None:
            return Failed(self._request.request_id, self._cut_by)
        return self._events.popleft() if self._events else None

    def _sink(self, event: Event) -> None:
        """Runs in the engine's thread."""
        if self._cut_by is not None and isinstance(event, Aborted):
            event = Failed(event.request_id, self._cut_by)
        if isinstance(event, TERMINAL):
            self._has_ended = True
        if self._on_event is not None:
            self._on_event(event)
        if self._cut_by is not None:
            return
        self._events.append(event)
        if self._max_unread is not None and len(self._events) > self._max_unread and not self._has_ended:
            self.cut(SlowReader(self._max_unread))
            return
        self._wake_reader()

    def _wake_reader(self) -> None:
        if not self._is_wake_due:
            self._is_wake_due = True
            self._bell.ring(self._wake)

    def _wake(self) -> None:
        # Cleared before readers look: an event that comes after this line schedules a wake-up of its own.
        self._is_wake_due = False
        self._arrived.set()


class _Bell:
    """Wakes an event loop once for what all its streams have heard meanwhile: as a rule, once a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_due = False

    def ring(self, then: Callable[[], None]) -> None:
        """Call something in the loop, soon. From any thread."""
        self._waiting.append(then)
        loop = self._loop()
        if self._is_due or loop is None:
            return
        self._is_due = True
        try:
            loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            return  # the loop is closed: the server is gone, and nobody reads

    def _wake(self) -> None:
        self._is_due = False  # before looking, as above
        while self._waiting:
            self._waiting.popleft()()


_BELLS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Bell] = weakref.WeakKeyDictionary()


def _bell_of(loop: asyncio.AbstractEventLoop) -> _Bell:
    """The one of a loop. From the loop's thread."""
    bell = _BELLS.get(loop)
    if bell is None:
        bell = _BELLS[loop] = _Bell(loop)
    return bell


def submit_all(streams: Sequence[EventStream]) -> None:
    """Hand the requests of several streams of one engine to it, or none of them. Raises as EventStream.submit does."""
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(stream._submitting())
        streams[0]._engine.submit_all([(stream._request, stream._sink) for stream in streams])
