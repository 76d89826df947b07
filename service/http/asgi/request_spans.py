"""A span around every request but the routine ones, in a server that sends traces."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.http.asgi.request_log import ROUTINE_PATHS
from service.http.tracing import RequestTrace, Tracing


class RequestSpans:
    """Makes the trace of a request, and says in it how the request was answered. Outside of RequestLog, which notes that."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["path"] in ROUTINE_PATHS:
            await self._app(scope, receive, send)
            return
        with self._tracing.request(scope["method"], Headers(scope=scope)) as trace:
            try:
                await self._app(scope, receive, send)
            finally:
                _tell(trace, scope)


def _tell(trace: RequestTrace, scope: Scope) -> None:
    state = scope["state"]
    route = getattr(scope.get("route"), "path", None)  # as it is declared: "/adapters/{name}"
    attributes: dict[str, str | int] = {
        "http.response.status_code": state["status"],
        "dylora.request_id": state["request_id"],
    }
    if route is not None:
        attributes["http.route"] = route
    if "error_type" in state:
        attributes["error.type"] = state["error_type"]
    trace.answered(f"{scope['method']} {route}" if route else scope["method"], attributes, is_error=state["status"] >= 500)
