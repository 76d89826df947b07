"""Around the whole application of a replica that stands behind a cluster's proxy."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.asgi.middleware import REQUEST_ID_HEADER

REPLICA_HEADER = "X-Replica"


class NamedReplica:
    """Says in every answer which replica gave it, and leaves the request's id to the proxy, which gave the request one and
    repeats it in the answer.
    """

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[REPLICA_HEADER] = self._name
                if headers.get(REQUEST_ID_HEADER) == given:  # else it was of a harmful form, and the log has ours
                    del headers[REQUEST_ID_HEADER]
            await send(message)

        await self._app(scope, receive, send_named)
