"""A process that puts adapters into a store until it is killed; started once, it forks the victims.

    python -m tests.store_worker ROOT UPLOAD UPLOAD [--shared]

Reads one line per victim from standard input: `loop` puts the two uploads in turn for ever; a number N makes the victim kill
itself just before its Nth change of the file system in one `put` of the second upload. Each victim's pid is written to standard
output as `pid P`, each acknowledged version as `ack VERSION`, its end as `end STATUS`. torch is imported once,
whatever the number of victims.
"""

import itertools
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from adapters.store.store import AdapterStore

_WATCHED = frozenset(
    {
        *("open", "write", "writelines", "flush", "close", "truncate", "fsync", "serialize_file"),
        *("rename", "replace", "unlink", "mkdir", "rmdir", "flock"),
    }
)
"""Built-in functions, by name, that change a file or a folder."""


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def _die_before(nth: int) -> None:
    """Arrange for SIGKILL before the nth call from now on that changes the file system."""
    left = itertools.count(nth - 1, -1)

    def on_event(frame: FrameType, event: str, called: object) -> None:
        if event == "c_call" and getattr(called, "__name__", "") in _WATCHED and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(on_event)


def _victim(order: str, root: Path, uploads: list[Path], is_shared: bool) -> None:
    with AdapterStore(root, max_adapters=4, max_total_bytes=1 << 30, is_shared=is_shared) as store:
        if order == "loop":
            _say("open")
            for upload in itertools.cycle(uploads):
                _say(f"ack {store.put('a', upload).version}")
        _die_before(int(order))
        _say(f"ack {store.put('a', uploads[1]).version}")


def main() -> None:
    """Fork one victim for each line of standard input, and wait for it."""
    root, *uploads = (Path(each) for each in sys.argv[1:] if each != "--shared")
    _say("ready")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _victim(line.strip(), root, uploads, "--shared" in sys.argv)
            os._exit(0)
        _say(f"pid {pid}")
        _say(f"end {os.waitpid(pid, 0)[1]}")


if __name__ == "__main__":
    main()
