"""The store's dealings with the file system: durable writes, atomic replacement, content digests."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.store.archive import ADAPTER_FILES


def digest_folder(folder: Path) -> str:
    """SHA-256, in hex, over the adapter files' names, lengths and bytes.

    Raises:
        OSError: one can't be read.
    """
    digest = hashlib.sha256()
    for name in sorted(ADAPTER_FILES):
        path = folder / name
        if not path.exists():
            continue
        digest.update(f"{name}:{path.stat().st_size}:".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """Bytes of the adapter files in a folder."""
    return sum((folder / name).stat().st_size for name in ADAPTER_FILES if (folder / name).exists())


def sync_folder(folder: Path) -> None:
    """Make a folder's entries and the files in it durable."""
    for path in folder.iterdir():
        if path.is_file():
            _sync(path)
    _sync(folder)


def move_folder(source: Path, target: Path) -> None:
    """Move a folder within one file system, atomically and durably; `target` must not exist."""
    source.rename(target)
    _sync(target.parent)


def replace_json(path: Path, content: Mapping[str, Any], scratch: Path) -> None:
    """Write a JSON file so that a reader, or a machine that starts after a crash, finds the old content or the new.

    Args:
        path: the file, new or old.
        content: what it shall hold.
        scratch: a folder on the same file system.
    """
    temporary = scratch / f"{uuid.uuid4().hex}.json"
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def remove_file(path: Path) -> None:
    """Remove a file durably."""
    path.unlink()
    _sync(path.parent)


def discard_folder(folder: Path, scratch: Path) -> None:
    """Remove a folder so that it is never seen half empty: out of the way first, then file by file."""
    doomed = scratch / uuid.uuid4().hex
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_folder(folder: Path) -> None:
    """Remove everything inside a folder."""
    for path in folder.iterdir():
        remove_anything(path)


def remove_anything(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
