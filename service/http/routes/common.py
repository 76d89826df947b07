"""What all routes share: access to the server's parts, and how errors look in the OpenAPI document.

Dependencies are coroutine functions though they wait for nothing: FastAPI runs any other in a thread, at each request.
"""

from typing import Annotated, Any

from fastapi import Depends, Path, Request, Security, params
from fastapi.security import HTTPBearer

from service.errors import InvalidRequest
from service.http.generation.arrival import Arrival
from service.http.openai.answer_schemas import OpenAIError
from service.http.schemas import ErrorResponse
from service.http.services import Services
from service.http.tenants import check_scope
from service.keys import ApiKey, Scope


async def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)  # set by create_app
    return services


TheServices = Annotated[Services, Depends(_services)]
"""A route's access to the server's parts."""

_bearer = HTTPBearer(auto_error=False, description="An API key, where the server has keys.")
"""For the OpenAPI document only: the middleware has looked at the key by then."""


ADAPTER_NAME = "The adapter's name: letters, digits, '.', '_', '-'."
NAME_SCHEMA: dict[str, Any] = {"pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"}
"""For the document. Whatever else a name may be, there is no adapter of that name."""


async def _caller(request: Request) -> ApiKey:
    caller = request.state.caller
    assert isinstance(caller, ApiKey)  # set by the middleware
    return caller


TheCaller = Annotated[ApiKey, Depends(_caller)]
"""Whose key the request came with."""


async def _adapter_name(
    name: Annotated[str, Path(description=ADAPTER_NAME, max_length=256, json_schema_extra=NAME_SCHEMA)],
    services: TheServices,
    caller: TheCaller,
) -> str:
    await services.find_adapter(name, caller.name)
    return name


AdapterName = Annotated[str, Depends(_adapter_name)]
"""The adapter of a path; what another server has put under that name is served by then."""


def needs(scope: Scope) -> params.Depends:
    """What a route or router declares: only keys with this scope may use it; others are answered with 403."""

    async def check(caller: TheCaller, _: Annotated[object, Security(_bearer)]) -> None:
        check_scope(caller, scope)

    dependency: params.Depends = Depends(check)
    return dependency


async def _only_known_queries(request: Request) -> None:
    route = request.scope["route"]
    known = sorted(each.alias for each in route.dependant.query_params)
    for name in request.query_params:
        if name not in known:
            legal = f"legal: {', '.join(known)}" if known else "there are none here"
            raise InvalidRequest(name[:80], f"no such query parameter; {legal}")


ONLY_KNOWN_QUERIES: params.Depends = Depends(_only_known_queries)
"""What a router declares: a query parameter that a route does not have is refused, as an unknown field of a body is."""


def arrival_of(request: Request, *, is_streamed: bool) -> Arrival:
    """What a generating request brings along beside its body."""
    state = request.state
    return Arrival(request.headers, state.request_id, state.caller, state.admission, state.arrived_at, is_streamed)


_MEANINGS = {
    400: "Invalid; the message names every offender and what would be legal.",
    401: "No API key, or one that is not valid.",
    403: "The API key lacks the scope.",
    404: "No adapter of that name.",
    408: "The body came too slowly.",
    409: "The name is in use by another upload, or by an adapter that is shared and that the API key may not change.",
    413: "The body is too large.",
    415: "Neither multipart nor zip.",
    422: "Invalid; the message names every offender and what would be legal.",
    429: "The API key is over one of its limits; see Retry-After.",
    500: "The engine failed on this request.",
    503: "The queue is full, or the server is loading or draining; see Retry-After.",
    504: "The request was not complete by its deadline.",
    507: "The store, or its disk, is full.",
}


def plain_text(description: str) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers well in plain text, and with errors in JSON."""
    return {200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": description}}


def event_stream(description: str) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers with server-sent events, perhaps beside its response_model."""
    return {200: {"content": {"text/event-stream": {}}, "description": description}}


def openai_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route under /v1. FastAPI adds a 422 of its own to a document that leaves others out."""
    listed: dict[int | str, dict[str, Any]]
    listed = {status: {"model": OpenAIError, "description": _MEANINGS[status]} for status in statuses}
    return listed | {"default": {"model": OpenAIError, "description": "Any other error."}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route."""
    return {status: {"model": ErrorResponse, "description": _MEANINGS[status]} for status in statuses}
