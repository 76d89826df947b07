"""Runs the application under uvicorn, and ends it without dropping what runs."""

import asyncio
import math
import os
import signal
import socket
import threading
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.http.asgi.connection import BoundedConnection
from service.http.services import Services
from service.log import entry, logger

_CLOSE_CONNECTIONS_S = 5
"""How long connections may take at least to read the rest of their answers once nothing is generated any more."""


class DrainingServer(uvicorn.Server):
    """First SIGTERM or SIGINT: readiness off, new requests get 503, what runs is finished. The second ends at once.

    SIGHUP reads the API keys again.
    """

    def __init__(self, app: FastAPI, host: str, port: int, drain_timeout_s: float) -> None:
        services = app.state.services
        assert isinstance(services, Services)
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            http=BoundedConnection,
            ws="none",
            timeout_keep_alive=services.settings.keep_alive_s,  # type: ignore[arg-type]  # whatever call_later takes
            timeout_graceful_shutdown=_CLOSE_CONNECTIONS_S,
        )
        super().__init__(config)
        self._services = services
        self._drain_timeout_s = drain_timeout_s
        self.all_ended = True
        """Whether every request in flight ended by itself."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Bind, and say where."""
        if threading.current_thread() is threading.main_thread():  # no other thread gets signals
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._services.tenants.reload)
        await super().startup(sockets)
        if self.started:
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            logger.info(entry("listening", url=f"http://{host}:{self.bound_port()}"))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal. uvicorn's own would close the listener first, and raise the signal again at the end."""
        if self._services.draining.is_set():
            logger.warning("second signal: ending at once, whatever runs")
            # A step can take seconds and no thread can be interrupted. Nothing is lost by this: what the store has
            # acknowledged survives a kill at any moment.
            os._exit(1)
        self._services.draining.set()
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def bound_port(self) -> int:
        """The port that is listened on, also where the settings said 0. Only while running."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    def _drain(self) -> None:
        logger.info(entry("draining", timeout_s=self._drain_timeout_s))
        ends_at = time.monotonic() + self._drain_timeout_s
        self.all_ended = self._services.engine.drain(self._drain_timeout_s)
        if not self.all_ended:
            logger.warning("requests still ran at the end of the drain timeout and are failed")
            self._services.engine.stop()
        # Uploads, exports and the rest of answers have what is left.
        left_s = math.ceil(ends_at - time.monotonic())
        self.config.timeout_graceful_shutdown = max(_CLOSE_CONNECTIONS_S, left_s)
        self.should_exit = True

    async def _wait_tasks_to_complete(self) -> None:
        try:
            await super()._wait_tasks_to_complete()
        except asyncio.CancelledError:  # the time is over
            self.all_ended = False
            raise


def run(app: FastAPI, *, host: str, port: int, drain_timeout_s: float) -> int:
    """Serve until a signal. 0 if every request ended by itself, 1 if some were cut off or nothing could be served."""
    server = DrainingServer(app, host, port, drain_timeout_s)
    try:
        server.run()
    except SystemExit:
        return 1  # uvicorn could not listen, and has logged why
    return 0 if server.started and server.all_ended else 1
