"""One line for each request: what was asked and how it was answered, never what was said.

A request that the engine has taken has its line at its terminal event (tracking.py); all others have theirs here.
"""

import logging
from asyncio import get_running_loop

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.asgi.auth import PROBE_PATHS
from service.http.error_table import BUG, CLIENT_GONE
from service.http.tracing import current_trace
from service.log import entry, logger

ROUTINE_PATHS = (*PROBE_PATHS, "/metrics")
"""Asked every few seconds: told at level debug."""
_MAX_PATH = 200


class RequestLog:
    """Logs a request when its answer has been sent, and leaves its `status` in the request's state."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope["state"]
        state["status"] = CLIENT_GONE.status

        async def send_noting_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting_status)
        except Exception:
            state["status"] = BUG.status
            raise
        finally:
            if not state.get("is_submitted"):
                _log(scope)


def _log(scope: Scope) -> None:
    state = scope["state"]
    is_routine = scope["path"] in ROUTINE_PATHS and state["status"] < 400
    caller = state.get("caller")
    trace = current_trace()
    line = entry(
        "answered",
        request_id=state["request_id"],
        status=state["status"],
        error_type=state.get("error_type"),
        key=caller.name or None if caller else None,
        method=scope["method"],
        path=scope["path"][:_MAX_PATH],  # without the query
        trace_id=trace.trace_id if trace else None,
        seconds=get_running_loop().time() - state["arrived_at"],
    )
    logger.log(logging.DEBUG if is_routine else logging.INFO, line)
