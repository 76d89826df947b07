"""POST /v1/completions and /v1/chat/completions, GET /v1/models: what OpenAI's clients and vLLM's speak."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from service.http.generation.served import WholeAnswer
from service.http.generation.submit import Submitted
from service.http.openai.answer_schemas import ChatCompletion, Completion, Model, ModelList
from service.http.openai.answers import collect_chat, collect_completion
from service.http.openai.heading import Heading
from service.http.openai.models import find_model, list_models
from service.http.openai.schemas import ChatRequest, CompletionRequest
from service.http.openai.streams import stream_chat, stream_completion
from service.http.openai.tasks import chat_task, completion_task
from service.http.routes.answering import answer_streamed, answer_whole
from service.http.routes.common import ONLY_KNOWN_QUERIES, TheCaller, TheServices, event_stream, needs, openai_errors
from service.keys import Scope

router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    dependencies=[needs(Scope.GENERATE), ONLY_KNOWN_QUERIES],
    responses=openai_errors(400, 401, 403, 429, 500),
)
_GENERATING = openai_errors(404, 408, 413, 503, 504)


_OR_STREAM = event_stream("Whole; with stream, server-sent events, each OpenAI's chunk object, and [DONE] as the last.")


@router.post("/completions", response_model=Completion, responses={**_OR_STREAM, **_GENERATING})
async def completions(body: CompletionRequest, request: Request, services: TheServices, caller: TheCaller) -> Response:
    """Go on from prompts, as OpenAI's completions do."""
    task = completion_task(body, services.engine.model.name, partial(services.registry.knows, viewer=caller.name))
    engine = services.engine

    def heading(submitted: Submitted) -> Heading:
        return Heading.of(services, submitted, f"cmpl-{request.state.request_id}")

    async def collect(submitted: Submitted) -> WholeAnswer:
        return await collect_completion(submitted, body, heading(submitted), engine)

    if body.stream:
        return await answer_streamed(
            request,
            services,
            task,
            lambda submitted, first: stream_completion(submitted, body, heading(submitted), engine, first),
        )
    return await answer_whole(request, services, task, collect)


@router.post("/chat/completions", response_model=ChatCompletion, responses={**_OR_STREAM, **_GENERATING})
async def chat_completions(body: ChatRequest, request: Request, services: TheServices, caller: TheCaller) -> Response:
    """Go on with a conversation, through the model's chat template."""
    task = chat_task(body, services.engine.model.name, partial(services.registry.knows, viewer=caller.name))

    def heading(submitted: Submitted) -> Heading:
        return Heading.of(services, submitted, f"chatcmpl-{request.state.request_id}")

    async def collect(submitted: Submitted) -> WholeAnswer:
        return await collect_chat(submitted, body, heading(submitted))

    if body.stream:
        return await answer_streamed(
            request, services, task, lambda submitted, first: stream_chat(submitted, body, heading(submitted), first)
        )
    return await answer_whole(request, services, task, collect)


@router.get("/models")
async def models(services: TheServices, caller: TheCaller) -> ModelList:
    """What `model` may name: the base, and each adapter with its ranks and measured quality."""
    return ModelList(data=list_models(services, caller.name))


@router.get("/models/{name:path}", responses=openai_errors(404, 503))
async def model(
    name: Annotated[str, Path(description="Its id.", max_length=512)], services: TheServices, caller: TheCaller
) -> Model:
    """One of them."""
    await services.find_adapter(name.partition("@")[0], caller.name)
    return find_model(services, name, caller.name)
