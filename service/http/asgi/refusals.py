"""An error as an answer: the body that clients of the route expect, its headers, its count. For routes and middleware."""

from collections.abc import Mapping

from starlette.responses import JSONResponse
from starlette.types import Scope

from adapters.errors import IllegalRank
from service.errors import (
    AdapterUnfit,
    InvalidRequest,
    KeyOverLimit,
    NoKey,
    QueueFull,
    SloUnattainable,
    UnknownAdapter,
    WrongScope,
)
from service.http.error_table import CLIENT_GONE, ErrorKind, kind_of, openai_body, openai_status, retry_after
from service.http.services import Services

GENERATING_PATHS = ("/", "/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions")


def refuse(
    scope: Scope,
    kind: ErrorKind,
    message: str,
    headers: Mapping[str, str] | None = None,
    param: str | None = None,
    facts: Mapping[str, object] | None = None,
) -> JSONResponse:
    """The answer to a request that is not served as it stands, counted by its kind.

    Args:
        param: the field that is to blame, where there is one.
        facts: more fields of the body, for programs to read.
    """
    services: Services = scope["app"].state.services
    scope.setdefault("state", {})["error_type"] = kind.type  # for the log
    if kind != CLIENT_GONE:
        services.metrics.error_answered(kind.type)
    is_generating = scope["method"] == "POST" and scope["path"] in GENERATING_PATHS
    if is_generating and not scope.get("state", {}).get("is_submitted"):  # else its terminal event is counted
        services.metrics.refused()
    body: Mapping[str, object] = {"error": message, "error_type": kind.type}
    status = kind.status
    if scope["path"].startswith("/v1/"):
        body, status = openai_body(message, kind, param), openai_status(kind)
    return JSONResponse({**body, **(facts or {})}, status, dict(headers or {}))


def refuse_error(scope: Scope, error: Exception) -> JSONResponse:
    """The answer to an error of either tree."""
    return refuse(scope, kind_of(error), str(error), _headers(scope, error), _param(error), _facts(error))


def _param(error: Exception) -> str | None:
    """The field that is to blame."""
    match error:
        case InvalidRequest():
            return error.field
        case UnknownAdapter() | AdapterUnfit():
            return "model"
        case IllegalRank():
            return "rank"
    return None


def _facts(error: Exception) -> dict[str, object]:
    """More fields of the body."""
    if not isinstance(error, SloUnattainable):
        return {}
    times = {name: round(ms, 2) for name, ms in error.attainable._asdict().items()}
    return {"attainable": {"rank": error.rank, **times}}


def _headers(scope: Scope, error: Exception) -> dict[str, str]:
    """RFC 6750 says what a bearer challenge holds."""
    match error:
        case NoKey():
            return {"WWW-Authenticate": 'Bearer realm="dylora"' + (', error="invalid_token"' if error.was_given else "")}
        case WrongScope():
            return {"WWW-Authenticate": f'Bearer realm="dylora", error="insufficient_scope", scope="{error.needed}"'}
        case KeyOverLimit():
            return {"Retry-After": str(error.retry_after_s)}
        case SloUnattainable(is_for_good=True):
            return {}
        case QueueFull() | SloUnattainable():
            services: Services = scope["app"].state.services
            stats = services.engine.stats()
            return {"Retry-After": str(services.drain_rate.retry_after_s(stats.running, stats.waiting))}
    return retry_after(kind_of(error))
