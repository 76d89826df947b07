"""Plain prompt/completion JSONL."""

import json
from pathlib import Path

from adapters.data.example import Example
from adapters.data.text_file import filled, not_empty, read_text
from adapters.errors import DataError

JSONL_KEYS = ("prompt", "completion")


def read_jsonl(path: Path) -> tuple[Example, ...]:
    """Read a file of `{"prompt": ..., "completion": ...}` lines; blank lines are skipped, each line is one Example.

    `completion` is taken as it stands: no space is put before it. Other keys are refused, so that a misspelt one is
    noticed.

    Raises:
        DataError: the file can't be read, or a line isn't of that form; names the file and the line.
    """
    lines = enumerate(read_text(path).splitlines(), start=1)
    return not_empty(tuple(_jsonl_example(text, path, line) for line, text in lines if text.strip()), path)


def _jsonl_example(text: str, path: Path, line: int) -> Example:
    expected = 'expected {"prompt": "...", "completion": "..."}'
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {line}: not JSON ({error}); {expected}") from error
    is_pair = isinstance(row, dict) and sorted(row) == sorted(JSONL_KEYS)
    if not (is_pair and all(isinstance(value, str) for value in row.values())):
        raise DataError(f"{path}, line {line}: {expected}, two strings and nothing else")
    prompt, completion = (filled(row[key], path, line, key) for key in JSONL_KEYS)
    return Example(prompt, (completion,))
