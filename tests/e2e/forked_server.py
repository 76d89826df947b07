"""The same server, started in a fraction of a second: forked from a process that has imported torch and transformers.

For stories that start it many times. What runs is `dylora serve` in a process of its own, which dies as any other.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from loadtests.server_process import ServerProcess
from service import cli


class ForkedServer(ServerProcess):
    """A `ServerProcess` whose every start but the first skips the imports."""

    def __init__(self, settings: Mapping[str, object], log: Path) -> None:
        super().__init__(settings, log)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["service.launch", "tests.e2e.forked_server"])

    def _launch(self) -> "_Forked":
        options = [f"--{name.replace('_', '-')}={value}" for name, value in self.settings.items()]
        process = self._context.Process(target=_serve, args=(["serve", *options], self._log), daemon=True)
        process.start()
        return _Forked(process)


class _Forked:
    """A forked process with `subprocess.Popen`'s manners."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("dylora serve", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _serve(arguments: Sequence[str], log: Path) -> None:
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    # Locks that tqdm makes would else be kept in a list that outlives a killed server, and be complained of at the end.
    multiprocessing.set_start_method("fork", force=True)
    sys.exit(cli.main(arguments))
