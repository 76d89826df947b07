"""Around every request: its id, and a bound on its body. Plain ASGI, so that disconnects and streams pass unchanged."""

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADER = "X-Request-Id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_UPLOAD_OVERHEAD_BYTES = 1024 * 1024
"""Config, quality profile and multipart framing, on top of the tensors."""


class RequestIds:
    """Gives every request an id, the client's own if it is of a harmless form, and answers with it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class BodyLimit:
    """Refuses bodies above a limit with 413: by Content-Length at once, else as soon as the bytes exceed it."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_upload_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["method"] == "PUT" and scope["path"].startswith("/adapters/")
        limit = self._max_upload_bytes if is_upload else self._max_body_bytes
        message = f"the body is larger than the limit of {limit} bytes"
        limit += _UPLOAD_OVERHEAD_BYTES if is_upload else 0
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and (len(length) > 18 or int(length) > limit):
            # The unread body makes the connection useless: say so.
            headers = {"Connection": "close"}
            answer = JSONResponse({"error": message, "error_type": "too_large"}, 413, headers)
            await answer(scope, receive, send)
            return
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            event = await receive()
            received += len(event.get("body", b""))
            if received > limit:
                raise HTTPException(413, message, {"Connection": "close"})
            return event

        await self._app(scope, receive_bounded, send)
