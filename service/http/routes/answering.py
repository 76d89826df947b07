"""A task as an HTTP answer, whole or streamed, for every generating route."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette import types

from service.core import Event, TokenEvent
from service.http.asgi.disconnect import closing_on_disconnect
from service.http.error_table import CLIENT_GONE
from service.http.generation.fan_out import FanOut
from service.http.generation.served import ClientGone, WholeAnswer, finished_or_raise, serving_headers, timing_headers
from service.http.generation.submit import Submitted, Task, submit
from service.http.routes.common import arrival_of
from service.http.services import Services

Collect = Callable[[Submitted], Awaitable[WholeAnswer]]
Stream = Callable[[Submitted, tuple[int, Event]], AsyncIterator[str]]
"""Makes the text of a stream; it gets the first event, and the number of its sequence, which were read already."""


async def answer_whole(request: Request, services: Services, task: Task, collect: Collect) -> Response:
    """Generate, and answer when all is complete."""
    submitted = await _submit(request, services, task, is_streamed=False)
    try:
        with closing(submitted.sequences):
            async with closing_on_disconnect(request.receive, submitted.sequences):
                answer = await collect(submitted)
    except ClientGone:
        return Response(status_code=CLIENT_GONE.status)
    headers = serving_headers(submitted, answer.mode) | timing_headers(answer.usage)
    return Response(answer.text, media_type="application/json", headers=headers)


async def answer_streamed(request: Request, services: Services, task: Task, stream: Stream) -> Response:
    """Generate, and send every token as it is made."""
    submitted = await _submit(request, services, task, is_streamed=True)
    sequences = submitted.sequences
    try:
        # The first event is awaited before the headers are sent: they say its mode, and an early failure has a status.
        async with closing_on_disconnect(request.receive, sequences):
            first = await sequences.next()
        event = first[1]
        mode = event.mode if isinstance(event, TokenEvent) else finished_or_raise(event).mode
    except ClientGone:
        sequences.close()
        return Response(status_code=CLIENT_GONE.status)
    except BaseException:
        sequences.close()
        raise
    headers = serving_headers(submitted, mode) | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return _ClosingResponse(stream(submitted, first), sequences, headers)


async def _submit(request: Request, services: Services, task: Task, *, is_streamed: bool) -> Submitted:
    submitted = await submit(services, task, arrival_of(request, is_streamed=is_streamed))
    request.state.is_submitted = True  # from here on its terminal event is counted
    return submitted


class _ClosingResponse(StreamingResponse):
    """Aborts the sequences however the response ends, also before its first byte."""

    def __init__(self, content: AsyncIterator[str], sequences: FanOut, headers: dict[str, str]) -> None:
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._sequences = sequences

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._sequences.close()
