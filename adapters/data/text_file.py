"""What every reader of a data file needs: its text, and complaints that name the file and the place in it."""

from collections.abc import Iterator, Sized
from pathlib import Path
from typing import TypeVar

from adapters.errors import DataError

Items = TypeVar("Items", bound=Sized)

_OPENING_CHARS = 1 << 16


def read_text(path: Path) -> str:
    """The whole file. Raises DataError unless it is UTF-8, with or without a byte order mark."""
    return _read(path, None)


def read_opening(path: Path) -> str:
    """The first 64 Ki characters, and on to the end of their last line. Raises DataError as `read_text` does."""
    return _read(path, _OPENING_CHARS)


def _read(path: Path, chars: int | None) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read() if chars is None else file.read(chars) + file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text ({error})") from error


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """The lines that aren't blank, without their ends, numbered from 1."""
    # Not splitlines(): U+2028, form feeds and the like stand inside JSON strings and sentences.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def filled(text: str, path: Path, place: int | str, what: str) -> str:
    """`text`, unless it is blank or can't be written as UTF-8: then DataError. `place` is a line's number, or words."""
    where = f"{path}, line {place}" if isinstance(place, int) else f"{path}, {place}"
    if not text.strip():
        raise DataError(f"{where}: {what} is empty; expected some text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise DataError(f"{where}: {what} is not valid Unicode ({error.reason}); expected whole characters") from error
    return text


def not_empty(items: Items, path: Path) -> Items:
    """`items`, unless there are none: then DataError."""
    if not len(items):
        raise DataError(f"{path}: no examples; expected at least one")
    return items
