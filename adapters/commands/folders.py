"""The adapter's folder that a command reads, and the new folder that it writes."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import AdapterError, InvalidAdapter
from adapters.limits import OWN_FILES

if TYPE_CHECKING:
    from adapters.adapter import Adapter

_CONFIGS = ("adapter_config.json", "config.json")
"""Of an adapter and of a model."""


def read_adapter(folder: Path | str) -> "Adapter":
    """The adapter in a folder.

    Raises:
        AdapterError: there is no such folder.
        InvalidAdapter: what is in it can't be read, each problem with the folder's name before it.
    """
    from adapters.checkpoint import read_peft

    if not Path(folder).is_dir():
        raise AdapterError(f"adapter: {folder} is not a folder; an adapter is one with adapter_config.json in it")
    try:
        return read_peft(Path(folder), limits=OWN_FILES)
    except InvalidAdapter as error:
        raise InvalidAdapter([f"{folder}: {problem}" for problem in error.problems]) from error


@contextmanager
def new_folder(out: Path | str) -> Iterator[Path]:
    """A folder to fill, whose files become `out`'s when the block ends, and are removed if the block fails.

    Where there is no `out` yet, it lies beside it, so that becoming it is one rename. A folder that is there stays the one
    it is, since it may be a mount or somebody's working directory: the files are moved in, the config last, without which no
    reader takes a folder for an adapter or a model.

    Raises:
        AdapterError: `out` is there and not an empty folder, or it can't be made.
    """
    target = Path(out).resolve()
    if target.exists() and not target.is_dir():
        raise AdapterError(f"out: {out} is a file; name a folder that is new or empty")
    if target.is_dir() and any(target.iterdir()):
        raise AdapterError(f"out: {out} is not empty; name a folder that is new or empty")
    is_new = not target.exists()
    partial = (target.parent if is_new else target) / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        if is_new:
            partial.rename(target)
        else:
            for file in sorted(partial.iterdir(), key=lambda file: file.name in _CONFIGS):
                file.rename(target / file.name)
    except OSError as error:
        raise AdapterError(f"out: {out} can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
