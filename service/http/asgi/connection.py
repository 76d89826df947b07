"""One HTTP connection with bounds that uvicorn's httptools protocol lacks: on the size, number and time of headers, on
bodies that nobody reads, on clients that do not read, and on the number of connections.
"""

import asyncio
import json
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.http.asgi.auth import PROBE_PATHS
from service.http.asgi.refusals import refuse
from service.http.error_table import (
    HEADERS_TOO_LARGE,
    NOT_HTTP,
    TOO_MANY_CONNECTIONS,
    TOO_SLOW,
    ErrorKind,
    retry_after,
)
from service.http.services import Services
from service.settings import Settings


class _HeadersTooLarge(Exception):
    """Stops the parser."""


class BoundedConnection(HttpToolsProtocol):
    """A connection is in one of four states, of which all but the third have a time limit:

    - headers are awaited or arriving: `header_timeout_s`, and between requests uvicorn's keep-alive timeout;
    - a body is arriving and is read: the middleware BodyLimit looks after it;
    - the request is being answered, and what is written is read;
    - a body is still arriving though its request is answered: `body_timeout_s`.

    Beside them `write_timeout_s` runs while the client does not read what fills the buffers.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for headers."""
        super().connection_made(transport)
        services: Services = self.config.app.state.services  # type: ignore[union-attr]
        self._services = services
        self._settings: Settings = services.settings
        self._is_head_awaited = True
        self._has_begun = self._has_completed_one = False
        self._head_bytes = self._parsed_bytes = 0
        self._refusal: tuple[ErrorKind, str] | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None
        self._free_app = self.app
        self._full_app = _too_many_connections(self.app, self.config.app)
        self._start_read_timer(self._settings.header_timeout_s, self._headers_too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks, and tell the request that is being answered.

        uvicorn tells the last one that was read, which is another where a client sends requests ahead of answers.
        """
        self._stop_read_timer()
        self._stop_write_timer()
        self.pipeline.clear()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    # What comes in

    def data_received(self, data: bytes) -> None:
        """Parse, and start the clock of whatever is arriving now."""
        self._has_completed_one = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._is_head_awaited and self._has_begun and not self._has_completed_one:
            # All of it belongs to headers that are not complete: the parser keeps them until they are.
            self._head_bytes += len(data)
            if self._head_bytes > self._settings.max_header_bytes:
                self._refuse(HEADERS_TOO_LARGE, self._head_limits())
                return
        if self._read_timer is None and (self.cycle is None or self.cycle.response_complete):
            if self._is_head_awaited and self.timeout_keep_alive_task is None:
                self._start_read_timer(self._settings.header_timeout_s, self._headers_too_slow)
            elif not self._is_head_awaited:
                self._start_read_timer(self._settings.body_timeout_s, self.transport.close)

    def on_message_begin(self) -> None:
        """Headers begin."""
        super().on_message_begin()
        self._has_begun = True
        self._head_bytes = self._parsed_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A part of the path."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; also those that may follow a chunked body."""
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """The request goes to the application, unless there are too many connections."""
        self._is_head_awaited = False
        self._stop_read_timer()
        is_full = len(self.connections) > self._settings.max_connections
        self.app = self._full_app if is_full else self._free_app
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is complete, and the next thing to come are headers."""
        super().on_message_complete()
        self._is_head_awaited = self._has_completed_one = True
        self._has_begun = False
        self._stop_read_timer()

    def _count(self, more_bytes: int) -> None:
        self._parsed_bytes += more_bytes
        settings = self._settings
        if self._parsed_bytes > settings.max_header_bytes or len(self.headers) > settings.max_headers:
            self._refusal = (HEADERS_TOO_LARGE, self._head_limits())
            raise _HeadersTooLarge  # ends in send_400_response

    def _head_limits(self) -> str:
        settings = self._settings
        return f"the headers exceed the limit of {int(settings.max_header_bytes)} bytes or {settings.max_headers} headers"

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    # What goes out

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when the parser stops, whoever stopped it."""
        kind, message = self._refusal or (NOT_HTTP, "not a legal HTTP request")
        self._refuse(kind, message)

    def pause_writing(self) -> None:
        """The client does not read, and the buffers are full."""
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self._settings.write_timeout_s, self._nobody_reads)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._stop_write_timer()

    def _nobody_reads(self) -> None:
        # Not close(), which would wait until the client has read the rest.
        self._services.metrics.error_answered("slow_reader")
        self.transport.abort()

    def _headers_too_slow(self) -> None:
        if self._has_begun:
            self._refuse(TOO_SLOW, f"the headers did not arrive within {self._settings.header_timeout_s:g} s")
        else:
            self.transport.close()

    def _refuse(self, kind: ErrorKind, message: str) -> None:
        """Answer where there is no request to answer yet, and close."""
        self._services.metrics.error_answered(kind.type)
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # another answer is on its way, and this one would land in its middle
            return
        body = json.dumps({"error": message, "error_type": kind.type}).encode()
        fields = {"content-type": "application/json", "content-length": len(body), "connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode()
        self.transport.write(STATUS_LINE[kind.status] + head + b"\r\n" + body)
        self.transport.close()

    # Clocks

    def _start_read_timer(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_read_timer()
        self._read_timer = self.loop.call_later(seconds, then)

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def _too_many_connections(app: ASGIApp, application: object) -> ASGIApp:
    """What answers on a connection that is one too many: the probes still, since who watches must not be locked out.

    Args:
        app: what uvicorn calls, `application` inside uvicorn's own middleware.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in PROBE_PATHS:
            await app(scope, receive, send)
            return
        scope["app"] = application  # as the application itself would, whom this does not reach
        headers = {"Connection": "close"} | retry_after(TOO_MANY_CONNECTIONS)
        await refuse(scope, TOO_MANY_CONNECTIONS, "too many connections; try again in a moment", headers)(scope, receive, send)

    return answer
