"""Around every request: its id, and bounds on its body. Plain ASGI, so that disconnects and streams pass unchanged."""

import asyncio
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.asgi.refusals import refuse
from service.http.error_table import COMPRESSED, CUT_OFF, TOO_LARGE, TOO_SLOW, retry_after
from service.http.limits import body_time_s
from service.settings import Settings

REQUEST_ID_HEADER = "X-Request-Id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_CLOSE = {"Connection": "close"}
_UPLOAD_OVERHEAD_BYTES = 1024 * 1024
"""Config, quality profile and multipart framing, on top of the tensors."""


class RequestIds:
    """Gives every request an id, the client's own if it is of a harmless form, and answers with it; notes when it came."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        scope.setdefault("state", {}).update(request_id=request_id, arrived_at=asyncio.get_running_loop().time())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class CutOff:
    """Says so to a client whose request the end of a drain cuts off. Nothing else cancels a request as a whole."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        has_begun = False

        async def send_noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if not has_begun:
                message = "the server is shutting down, and the request was not complete in time"
                await refuse(scope, CUT_OFF, message, _CLOSE | retry_after(CUT_OFF))(scope, receive, send)


class HeadAsGet:
    """Answers HEAD wherever GET is answered, by the same headers; the connection leaves the body out. Innermost."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self._app({**scope, "method": "GET"} if is_head else scope, receive, send)


class BodyLimit:
    """Refuses bodies above a limit with 413: by Content-Length at once, else as soon as the bytes exceed it. Refuses those
    that come too slowly with 408, and those that are compressed with 415.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        encoding = Headers(scope=scope).get("content-encoding", "identity")
        if encoding.lower() != "identity":
            message = f"content-encoding: {encoding[:80]!r} is not read; send the body as it is"
            answer = refuse(scope, COMPRESSED, message, {**_CLOSE, "Accept-Encoding": "identity"})
            await answer(scope, receive, send)
            return
        is_upload = scope["method"] == "PUT" and scope["path"].startswith("/adapters/")
        limit = self._settings.max_adapter_bytes if is_upload else self._settings.max_body_bytes
        message = f"the body is larger than the limit of {int(limit)} bytes"
        limit_bytes = int(limit) + (_UPLOAD_OVERHEAD_BYTES if is_upload else 0)
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and (len(length) > 18 or int(length) > limit_bytes):
            # The unread body makes the connection useless: say so.
            answer = refuse(scope, TOO_LARGE, message, _CLOSE)
            await answer(scope, receive, send)
            return
        body = _BoundedBody(receive, limit_bytes, message, self._settings)
        await self._app(scope, body.receive, send)


class _BoundedBody:
    """The body of one request, as its application receives it."""

    def __init__(self, receive: Receive, limit_bytes: int, message: str, settings: Settings) -> None:
        self._receive = receive
        self._limit_bytes = limit_bytes
        self._message = message
        self._settings = settings
        self._received_bytes = 0
        self._started_at = asyncio.get_running_loop().time()
        self._is_complete = False

    async def receive(self) -> Message:
        if self._is_complete:  # what can still come is the client's going away, which has all the time
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._started_at + self._time_s()):
                event = await self._receive()
        except TimeoutError:
            message = f"the body did not arrive in time: {self._received_bytes} bytes in {self._time_s():.1f} s"
            raise HTTPException(TOO_SLOW.status, message, _CLOSE) from None
        self._received_bytes += len(event.get("body", b""))
        self._is_complete = not event.get("more_body", False)
        if self._received_bytes > self._limit_bytes:
            raise HTTPException(TOO_LARGE.status, self._message, _CLOSE)
        return event

    def _time_s(self) -> float:
        settings = self._settings
        return body_time_s(self._received_bytes, settings.body_timeout_s, settings.min_body_bytes_per_s)
