"""How processes, also of several machines, share a store's folder: who may be in it, who may change it, what others changed.

Locks are flock's: a process loses its own however it ends. On a network's file system they must reach across machines
(NFSv4, CephFS and Lustre with `flock` do; buckets mounted as folders do not).
"""

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from adapters.errors import AdapterError
from adapters.store.files import remove_anything

Stamp = tuple[int, int, int]
"""What is another for another file of the same name: inode, time of change, size."""

_LOCK = "lock"
_SUFFIX = ".json"


def lock_folder(root: Path, *, is_shared: bool = False) -> BinaryIO:
    """Own a folder, or be one of those who share it, until the returned file is closed or the process ends, however it ends.

    Raises:
        AdapterError: another store, in this process or another, owns it; or shares it, and this one wants it for itself.
    """
    file = (root / _LOCK).open("a+b")  # NFS shares a lock on what can be read, and owns one on what can be written
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        by = "another process, which does not share it" if is_shared else "another process"
        raise AdapterError(f"the adapter store {root} is in use by {by}") from error
    except OSError:
        file.close()
        raise
    return file


@contextmanager
def turn(root: Path) -> Iterator[None]:
    """Be the only one, of all threads and processes, to change the store inside the block; waits for the others. Not twice in
    one thread.
    """
    with (root / "turn").open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stamps(folder: Path) -> dict[str, Stamp]:
    """The stamp of each JSON file of a folder, by the file's name without its ending.

    Each is replaced by a new file, never written again, so one look at the folder tells which ones changed.
    """
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(_SUFFIX):
                with suppress(FileNotFoundError):  # deleted since the folder was read
                    found[entry.name.removesuffix(_SUFFIX)] = _stamp(entry.stat())
    return found


def stamp(path: Path) -> Stamp:
    """That of one file."""
    return _stamp(path.stat())


def claim_scratch(tmp: Path) -> tuple[Path, BinaryIO]:
    """Make a folder of one's own below `tmp`, and remove those whose processes have ended. Inside `turn`.

    Returns:
        The folder, and a file that must stay open as long as it is used.
    """
    for path in tmp.iterdir():
        if not _is_claimed(path):
            remove_anything(path)
    folder = tmp / uuid.uuid4().hex
    folder.mkdir()
    return folder, lock_folder(folder)


def _is_claimed(folder: Path) -> bool:
    if not (folder / _LOCK).is_file():
        return False
    try:
        lock_folder(folder).close()
    except AdapterError:
        return True
    return False


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_mtime_ns, status.st_size
