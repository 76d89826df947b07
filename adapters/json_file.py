"""Reading a small JSON file that somebody else wrote."""

import json
from pathlib import Path

from adapters.errors import InvalidAdapter


def read_json(path: Path, *, max_bytes: int) -> object:
    """The file's content.

    Raises:
        InvalidAdapter: it is absent, not a plain file, larger than `max_bytes`, not UTF-8, or not JSON; by file name.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise InvalidAdapter([f"{path.name}: missing"]) from error
    except OSError as error:
        raise InvalidAdapter([f"{path.name}: not a readable file"]) from error
    if len(raw) > max_bytes:
        raise InvalidAdapter([f"{path.name}: larger than {max_bytes} bytes"])
    try:
        content: object = json.loads(raw)
    # ValueError: not UTF-8, not JSON, or an integer of too many digits. RecursionError: nested too deeply.
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter([f"{path.name}: not valid JSON"]) from error
    return content
