"""The E2E NLG challenge's CSV files (Novikova, Dušek, Rieser 2017)."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from adapters.data.example import Example
from adapters.data.text_file import filled, not_empty, read_text
from adapters.errors import DataError

E2E_COLUMNS = ("mr", "ref")


def read_e2e(path: Path) -> tuple[Example, ...]:
    """Read one of E2E's CSV files (Novikova, Dušek, Rieser 2017): a meaning representation and its human references.

    Returns:
        one Example per distinct meaning representation, in order of first appearance, with all of its references.

    Raises:
        DataError: the file can't be read, or a row isn't of the form `mr,ref`; names the file and the line.
    """
    grouped: dict[str, list[str]] = {}
    for line, row in _csv_rows(path):
        grouped.setdefault(filled(row[0], path, line, "mr"), []).append(filled(row[1], path, line, "ref"))
    return not_empty(tuple(Example(mr, tuple(refs)) for mr, refs in grouped.items()), path)


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
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
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
