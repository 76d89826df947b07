"""POST /generate, POST /generate_stream, and POST / for clients that say in the body which of the two they want."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from service.errors import InvalidRequest
from service.http.generation.served import WholeAnswer
from service.http.generation.submit import Submitted
from service.http.routes.answering import answer_streamed, answer_whole
from service.http.routes.common import ONLY_KNOWN_QUERIES, TheServices, errors, event_stream, needs
from service.http.schemas import CompatRequest, GenerateRequest, GenerateResponse, StreamResponse
from service.http.services import Services
from service.http.tgi import answers
from service.http.tgi.tasks import generate_task
from service.keys import Scope

router = APIRouter(
    tags=["generate"],
    dependencies=[needs(Scope.GENERATE), ONLY_KNOWN_QUERIES],
    responses=errors(401, 403, 404, 408, 413, 422, 429, 500, 503, 504),
)


@router.post("/generate", response_model=GenerateResponse)
async def generate(body: GenerateRequest, request: Request, services: TheServices) -> Response:
    """Generate a text and answer when it is complete."""
    return await _whole(body, request, services, is_wrapped=False)


@router.post(
    "/generate_stream",
    response_model=StreamResponse,
    response_class=StreamingResponse,
    responses=event_stream("Server-sent events, each a StreamResponse."),
)
async def generate_stream(body: GenerateRequest, request: Request, services: TheServices) -> Response:
    """Generate a text and send every token as it is made, as server-sent events."""
    return await _streamed(body, request, services)


@router.post(
    "/",
    response_model=list[GenerateResponse],
    responses=event_stream("Whole; with stream, server-sent events, as of /generate_stream."),
)
async def generate_compat(body: CompatRequest, request: Request, services: TheServices) -> Response:
    """Either of the two by `stream`; a whole answer is wrapped in a list, as Hugging Face's inference API has it."""
    if body.stream:
        return await _streamed(body, request, services)
    return await _whole(body, request, services, is_wrapped=True)


async def _whole(body: GenerateRequest, request: Request, services: Services, *, is_wrapped: bool) -> Response:
    async def collect(submitted: Submitted) -> WholeAnswer:
        answer = await answers.collect(submitted, body)
        return WholeAnswer(f"[{answer.text}]", answer.mode, answer.usage) if is_wrapped else answer

    return await answer_whole(request, services, generate_task(body), collect)


async def _streamed(body: GenerateRequest, request: Request, services: Services) -> Response:
    _check_streamable(body)
    return await answer_streamed(
        request, services, generate_task(body), lambda submitted, first: answers.stream(submitted, body, first)
    )


def _check_streamable(body: GenerateRequest) -> None:
    """Raise InvalidRequest for what TGI refuses in streams, too."""
    if (best_of := body.parameters.best_of) not in (None, 1):
        raise InvalidRequest("best_of", f"{best_of} answers can't be streamed; legal in a stream: 1")
    if body.parameters.decoder_input_details:
        raise InvalidRequest("decoder_input_details", "true is not available in a stream; legal in a stream: false")
