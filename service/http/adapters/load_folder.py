"""Taking an adapter's files from a folder of the server's own disk, where a client names it.

A name is walked part by part from the configured folder, and no part nor file may be a link: so nothing outside it is ever
opened, also if somebody changes the folder meanwhile.
"""

import os
import shutil
import stat
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from adapters.errors import AdapterTooLarge
from adapters.store.archive import ADAPTER_FILES
from service.errors import InvalidRequest
from service.settings import variable

_SETTING = "lora_load_dir"
_CHUNK_BYTES = 1 << 20


def copy_from(root: Path | None, lora_path: str, target: Path, *, max_bytes: int) -> None:
    """Copy the adapter's files that lie in a folder.

    Args:
        root: the configured folder; None where the server has none.
        lora_path: relative to it, or absolute and inside it.
        target: an empty folder of ours.
        max_bytes: limit on all files together.

    Raises:
        InvalidRequest: loading is off, or there is no such folder inside the configured one.
        AdapterTooLarge: above the limit.
    """
    if root is None:
        raise InvalidRequest(
            "lora_path",
            f"this server loads nothing from its own disk; set {_SETTING} ({variable(_SETTING)}) to the folder that it may "
            "load from, or upload with PUT /adapters/{id}",
        )
    left = max_bytes
    with ExitStack() as stack:
        folder = _open_folder(root, lora_path, stack)
        for name in ADAPTER_FILES:
            left -= _copy(folder, name, target / name, left)
            if left < 0:
                raise AdapterTooLarge([f"the files are larger than the limit of {max_bytes} bytes"])


def _open_folder(root: Path, lora_path: str, stack: ExitStack) -> int:
    """A descriptor of the folder."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        path = PurePosixPath(lora_path)
        parts = path.relative_to(root.absolute().as_posix()).parts if path.is_absolute() else path.parts
        if ".." in parts:
            raise ValueError(lora_path)
        folder = _kept(os.open(root, flags), stack)
        for part in parts:
            folder = _kept(os.open(part, flags | os.O_NOFOLLOW, dir_fd=folder), stack)
    except (OSError, ValueError):
        # One message for all that can be wrong: nobody learns what there is outside.
        raise InvalidRequest(
            "lora_path", f"{lora_path[:200]!r} is no folder inside {_SETTING}, reached without links"
        ) from None
    return folder


def _kept(descriptor: int, stack: ExitStack) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _copy(folder: int, name: str, target: Path, limit: int) -> int:
    """Copy a file if it is there, and not more of it than one byte past the limit; its bytes."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # opening a named pipe must not wait for its writer
    try:
        descriptor = os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        return 0  # reading the copy says what is missing
    except OSError:
        raise InvalidRequest("lora_path", f"{name} is no file that can be read, or a link") from None
    with os.fdopen(descriptor, "rb") as source, target.open("xb") as copy:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidRequest("lora_path", f"{name} is no file that can be read, or a link")
        if os.fstat(descriptor).st_size > limit:
            return limit + 1
        shutil.copyfileobj(source, copy, _CHUNK_BYTES)
        return copy.tell()
