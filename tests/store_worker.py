"""A process that puts adapters into a store until it is killed; started once, it forks the victims.

    python -m tests.store_worker ROOT UPLOAD UPLOAD

Reads one line per victim from standard input: `loop` puts the two uploads in turn for ever; a number N makes the victim kill
itself just before its Nth dealing with the file system in one `put` of the second upload. Each victim's pid is written to standard
output as `pid P`, each acknowledged version as `ack VERSION`, its end as `end STATUS`. torch is imported once, whatever the number of victims.
"""

import itertools
import os
import signal
import sys
from pathlib import Path

from adapters.store import AdapterStore

_WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir", "os.listdir", "fcntl.flock"}


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def _die_before(nth: int) -> None:
    """Arrange for SIGKILL before the nth audited dealing with the file system from now on."""
    left = itertools.count(nth - 1, -1)

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in _WATCHED and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _victim(order: str, root: Path, uploads: list[Path]) -> None:
    with AdapterStore(root, max_adapters=4, max_total_bytes=1 << 30) as store:
        if order == "loop":
            _say("open")
            for upload in itertools.cycle(uploads):
                _say(f"ack {store.put('a', upload).version}")
        _die_before(int(order))
        _say(f"ack {store.put('a', uploads[1]).version}")


def main() -> None:
    """Fork one victim for each line of standard input, and wait for it."""
    root, *uploads = map(Path, sys.argv[1:])
    _say("ready")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _victim(line.strip(), root, uploads)
            os._exit(0)
        _say(f"pid {pid}")
        _say(f"end {os.waitpid(pid, 0)[1]}")


if __name__ == "__main__":
    main()
