"""Readers of training and evaluation data: the E2E challenge's CSV and plain prompt/completion JSONL."""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import DataError

E2E_COLUMNS = ("mr", "ref")
JSONL_KEYS = ("prompt", "completion")


@dataclass(frozen=True)
class Example:
    """One prompt, and the completions that are right for it (at least one)."""

    prompt: str
    completions: tuple[str, ...]


def read_e2e(path: Path) -> tuple[Example, ...]:
    """Read one of E2E's CSV files (Novikova, Dušek, Rieser 2017): a meaning representation and its human references.

    Returns:
        one Example per distinct meaning representation, in order of first appearance, with all of its references.

    Raises:
        DataError: the file can't be read, or a row isn't of the form `mr,ref`; names the file and the line.
    """
    grouped: dict[str, list[str]] = {}
    for line, row in _csv_rows(path):
        grouped.setdefault(_filled(row[0], path, line, "mr"), []).append(_filled(row[1], path, line, "ref"))
    return _not_empty(tuple(Example(mr, tuple(refs)) for mr, refs in grouped.items()), path)


def read_jsonl(path: Path) -> tuple[Example, ...]:
    """Read a file of `{"prompt": ..., "completion": ...}` lines; blank lines are skipped, each line is one Example.

    `completion` is taken as it stands: no space is put before it. Other keys are refused, so that a misspelt one is
    noticed.

    Raises:
        DataError: the file can't be read, or a line isn't of that form; names the file and the line.
    """
    lines = enumerate(_read_text(path).splitlines(), start=1)
    return _not_empty(tuple(_jsonl_example(text, path, line) for line, text in lines if text.strip()), path)


def reversed_pairs(examples: Iterable[Example]) -> tuple[Example, ...]:
    """Swap the sides: every completion becomes a prompt whose one right completion is the old prompt."""
    return tuple(Example(completion, (e.prompt,)) for e in examples for completion in e.completions)


def spaced(examples: Iterable[Example]) -> tuple[Example, ...]:
    """Put one space before every completion, so that it follows its prompt as a word follows a word.

    Runs of white space become one space on both sides: E2E's references have stray ones, which aren't worth learning.
    """
    return tuple(Example(_tidy(e.prompt), tuple(" " + _tidy(text) for text in e.completions)) for e in examples)


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    rows = csv.reader(_read_text(path).splitlines(keepends=True), strict=True)
    expected = f"expected the columns {', '.join(E2E_COLUMNS)}"
    try:
        header = next(rows, [])
        if tuple(header) != E2E_COLUMNS:
            raise DataError(f"{path}, line 1: {expected}, found {header}")
        for row in rows:
            if len(row) != len(E2E_COLUMNS):
                raise DataError(f"{path}, line {rows.line_num}: {expected}, found {len(row)} fields")
            yield rows.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: not CSV ({error}); {expected}") from error


def _jsonl_example(text: str, path: Path, line: int) -> Example:
    expected = 'expected {"prompt": "...", "completion": "..."}'
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {line}: not JSON ({error}); {expected}") from error
    is_pair = isinstance(row, dict) and sorted(row) == sorted(JSONL_KEYS)
    if not (is_pair and all(isinstance(value, str) for value in row.values())):
        raise DataError(f"{path}, line {line}: {expected}, two strings and nothing else")
    prompt, completion = (_filled(row[key], path, line, key) for key in JSONL_KEYS)
    return Example(prompt, (completion,))


def _filled(text: str, path: Path, line: int, what: str) -> str:
    if not text.strip():
        raise DataError(f"{path}, line {line}: {what} is empty; expected some text")
    return text


def _not_empty(examples: tuple[Example, ...], path: Path) -> tuple[Example, ...]:
    if not examples:
        raise DataError(f"{path}: no examples; expected at least one")
    return examples


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text ({error})") from error
