"""A real `dylora serve` as a process of its own, for load scripts and end-to-end tests."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import httpx
import psutil


class Running(Protocol):
    """What is asked of the server's process: a part of `subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def returncode(self) -> int | None:
        """Its exit status, None while it runs."""

    def poll(self) -> int | None:
        """Its exit status now."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status once it has ended; subprocess.TimeoutExpired if that takes too long."""

    def send_signal(self, number: int, /) -> None:
        """Send a signal, unless it has ended."""

    def kill(self) -> None:
        """Send SIGKILL."""


class ServerProcess:
    """Starts the server on a free port and waits until it is ready; ends it when the `with` block ends.

    Args:
        settings: settings by name, as `{"model": ..., "adapters_dir": ...}`. Others keep their defaults: those in the
            environment of the caller are not passed on.
        log: where the server's output goes, appended.
        start_timeout_s: the longest wait for readiness.
    """

    module = "service.cli"
    """What is run, with the argument `serve`."""

    def __init__(self, settings: Mapping[str, object], log: Path, *, start_timeout_s: float = 90) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start_s = 0.0
        self._log = log
        self._start_timeout_s = start_timeout_s
        self.settings = {**settings, "host": "127.0.0.1", "port": self.port}
        self._process: Running | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    @property
    def process(self) -> Running:
        """The running process.

        Raises:
            RuntimeError: it was not started.
        """
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process

    def start(self) -> None:
        """Start, or start again after a `kill`, and wait until /ready says so.

        Raises:
            RuntimeError: it ended, or was not ready in time; with the end of its output.
        """
        started = time.monotonic()
        self._process = self._launch()
        try:
            self._wait_until_ready(started + self._start_timeout_s)
        except BaseException:
            self.kill()
            raise
        self.start_s = time.monotonic() - started

    def _launch(self) -> Running:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DYLORA_")}
        environment |= {f"DYLORA_{name.upper()}": str(value) for name, value in self.settings.items()}
        command = [sys.executable, "-m", self.module, "serve"]
        with self._log.open("ab") as log:
            return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def _wait_until_ready(self, deadline: float) -> None:
        with httpx.Client(base_url=self.url, timeout=5) as client:
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.output()}")
                try:
                    if client.get("/ready").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.05)
        raise RuntimeError(f"the server was not ready within {self._start_timeout_s} s:\n{self.output()}")

    def output(self) -> str:
        """The end of what the server printed."""
        return self._log.read_text(errors="replace")[-8000:]

    def rss_bytes(self) -> int:
        """Resident memory of the process and its children."""
        process = psutil.Process(self.process.pid)
        return sum(int(p.memory_info().rss) for p in (process, *process.children(recursive=True)))

    def interrupt(self) -> None:
        """Send SIGTERM: finish what runs, then end."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, as a power cut would, and wait until the process is gone."""
        self.process.kill()
        self.process.wait()

    def end(self, timeout_s: float = 20) -> int:
        """Ask it to end, insist after `timeout_s`, and return its exit status."""
        self.interrupt()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.wait()


def free_port() -> int:
    """A TCP port of loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
