"""What all routes share: access to the server's parts, and how errors look in the OpenAPI document."""

from typing import Annotated, Any

from fastapi import Depends, Request

from service.http.schemas import ErrorResponse
from service.http.services import Services


def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)  # set by create_app
    return services


TheServices = Annotated[Services, Depends(_services)]
"""A route's access to the server's parts."""

_MEANINGS = {
    404: "No adapter of that name.",
    409: "The name is in use by another upload.",
    413: "The body is too large.",
    415: "Neither multipart nor zip.",
    422: "Invalid; the message names every offender and what would be legal.",
    500: "The engine failed on this request.",
    503: "The queue is full, or the server is loading or draining; see Retry-After.",
    507: "The store is full.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route."""
    return {status: {"model": ErrorResponse, "description": _MEANINGS[status]} for status in statuses}
