"""POST /generate, POST /generate_stream, and POST / for clients that say in the body which of the two they want."""

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette import types

from service.core import Mode, TokenEvent
from service.http import answers
from service.http.disconnect import closing_on_disconnect
from service.http.generation import Submitted, submit
from service.http.refusals import NOBODY_TO_ANSWER
from service.http.routes_common import TheServices, arrival_of, errors, needs
from service.http.schemas import CompatRequest, GenerateRequest, GenerateResponse, StreamResponse
from service.http.services import Services
from service.http.stream import EventStream
from service.keys import Scope

router = APIRouter(
    tags=["generate"],
    dependencies=[needs(Scope.GENERATE)],
    responses=errors(401, 403, 404, 408, 413, 422, 429, 500, 503, 504),
)


@router.post("/generate", response_model=GenerateResponse)
async def generate(body: GenerateRequest, request: Request, services: TheServices) -> Response:
    """Generate a text and answer when it is complete."""
    return await _whole(body, request, services, is_wrapped=False)


@router.post("/generate_stream", response_model=StreamResponse, response_class=StreamingResponse)
async def generate_stream(body: GenerateRequest, request: Request, services: TheServices) -> Response:
    """Generate a text and send every token as it is made, as server-sent events."""
    return await _streamed(body, request, services)


@router.post("/", response_model=list[GenerateResponse])
async def generate_compat(body: CompatRequest, request: Request, services: TheServices) -> Response:
    """Either of the two by `stream`; a whole answer is wrapped in a list, as Hugging Face's inference API has it."""
    if body.stream:
        return await _streamed(body, request, services)
    return await _whole(body, request, services, is_wrapped=True)


async def _whole(body: GenerateRequest, request: Request, services: Services, *, is_wrapped: bool) -> Response:
    submitted = await _submit(body, request, services, is_streamed=False)
    try:
        async with submitted.events, closing_on_disconnect(request.receive, submitted.events):
            answer, end = await answers.collect(submitted, body)
    except answers.ClientGone:
        return Response(status_code=NOBODY_TO_ANSWER)
    text = answer.model_dump_json(exclude={"details"} if answer.details is None else None)
    headers = answers.serving_headers(submitted, end.mode) | answers.timing_headers(end)
    return Response(f"[{text}]" if is_wrapped else text, media_type="application/json", headers=headers)


async def _streamed(body: GenerateRequest, request: Request, services: Services) -> Response:
    submitted = await _submit(body, request, services, is_streamed=True)
    events = submitted.events
    try:
        # The first event is awaited before the headers are sent: they say its mode, and an early failure has a status.
        async with closing_on_disconnect(request.receive, events):
            first = await events.next()
        mode = first.mode if isinstance(first, TokenEvent) else answers.finished_or_raise(first).mode
    except answers.ClientGone:
        return Response(status_code=NOBODY_TO_ANSWER)
    except BaseException:
        events.close()
        raise
    headers = answers.serving_headers(submitted, Mode(mode)) | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return _ClosingResponse(answers.stream(submitted, body, first), events, headers)


async def _submit(body: GenerateRequest, request: Request, services: Services, *, is_streamed: bool) -> Submitted:
    submitted = await submit(services, body, arrival_of(request, is_streamed=is_streamed))
    request.state.is_submitted = True  # from here on its terminal event is counted
    return submitted


class _ClosingResponse(StreamingResponse):
    """Aborts the request however the response ends, also before its first byte."""

    def __init__(self, content: AsyncIterator[str], events: EventStream, headers: dict[str, str]) -> None:
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._events.close()
