"""What every reader of a data file needs: its text, and complaints that name file and line."""

from collections.abc import Sized
from pathlib import Path
from typing import TypeVar

from adapters.errors import DataError

Items = TypeVar("Items", bound=Sized)


def read_text(path: Path) -> str:
    """The whole file. Raises DataError unless it is UTF-8, with or without a byte order mark."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text ({error})") from error


def filled(text: str, path: Path, line: int, what: str) -> str:
    """`text`, unless it is blank: then DataError."""
    if not text.strip():
        raise DataError(f"{path}, line {line}: {what} is empty; expected some text")
    return text


def not_empty(items: Items, path: Path) -> Items:
    """`items`, unless there are none: then DataError."""
    if not len(items):
        raise DataError(f"{path}: no examples; expected at least one")
    return items
