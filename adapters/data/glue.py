"""GLUE's TSV files (Wang et al. 2018, arXiv 1804.07461): SST-2, CoLA, MRPC and RTE, training and development sets.

Quotes are literal: a row is a line, a field what stands between two tabs. Classes are named and numbered as Hugging Face's
`glue` data set has them.
"""

from dataclasses import dataclass
from pathlib import Path

from adapters.data.example import LabelledText
from adapters.data.text_file import filled, lines_of, not_empty, read_text
from adapters.errors import DataError

_MARKS = frozenset("*?")
"""What CoLA's third column is made of, where it is not empty: `*`, `*?`, `?*`, `??`."""


@dataclass(frozen=True)
class GlueTask:
    """The columns of one task's files.

    Attributes:
        columns: every column's name, in order.
        has_header: whether the names are the file's first line.
        text: the column of the text, or of a pair's first text.
        label: the column of the label.
        classes: label as the file has it -> the class's name; numbered in this order.
        second: the column of a pair's second text.
    """

    columns: tuple[str, ...]
    has_header: bool
    text: str
    label: str
    classes: dict[str, str]
    second: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes' names."""
        return tuple(self.classes.values())

    def recognises(self, opening: str) -> bool:
        """Whether a file that starts with `opening` has these columns: by its header and first row, else by all its rows."""
        rows = [tuple(line.split("\t")) for _, line in lines_of(opening)]
        if self.has_header:
            return rows[:1] == [self.columns] and all(map(self._is_row, rows[1:2]))  # WNLI has RTE's header, and other labels
        return all(map(self._is_row, rows))

    def _is_row(self, fields: tuple[str, ...]) -> bool:
        row = dict(zip(self.columns, fields, strict=False))
        is_marked = set(row.get("mark", "").strip()) <= _MARKS
        return len(fields) == len(self.columns) and row[self.label] in self.classes and is_marked


SST2 = GlueTask(("sentence", "label"), True, "sentence", "label", {"0": "negative", "1": "positive"})
COLA = GlueTask(("source", "label", "mark", "sentence"), False, "sentence", "label", {"0": "unacceptable", "1": "acceptable"})
MRPC = GlueTask(
    ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    True,
    "#1 String",
    "Quality",
    {"0": "not_equivalent", "1": "equivalent"},
    second="#2 String",
)
RTE = GlueTask(
    ("index", "sentence1", "sentence2", "label"),
    True,
    "sentence1",
    "label",
    {"entailment": "entailment", "not_entailment": "not_entailment"},
    second="sentence2",
)


def read_glue(path: Path, task: GlueTask) -> tuple[LabelledText, ...]:
    """Read a training or development set; each row is one LabelledText, without white space at either end.

    Raises:
        DataError: the file can't be read, or a row isn't of the task's form; names the file and the line.
    """
    rows = lines_of(read_text(path))
    expected = f"expected the columns {', '.join(task.columns)}, separated by tabs"
    if task.has_header:
        line, header = next(rows, (1, ""))
        if tuple(header.split("\t")) != task.columns:
            raise DataError(f"{path}, line {line}: {expected}, found {header[:80]!r}")
    items = []
    for line, row in rows:
        fields = row.split("\t")
        if len(fields) != len(task.columns):
            raise DataError(f"{path}, line {line}: {expected}, found {len(fields)} fields")
        items.append(_labelled(dict(zip(task.columns, fields, strict=True)), task, path, line))
    return not_empty(tuple(items), path)


def _labelled(row: dict[str, str], task: GlueTask, path: Path, line: int) -> LabelledText:
    label = row[task.label]
    if label not in task.classes:
        raise DataError(f"{path}, line {line}: {task.label} is {label[:80]!r}; expected one of {', '.join(task.classes)}")
    return LabelledText(
        filled(row[task.text], path, line, task.text).strip(),
        list(task.classes).index(label),
        None if task.second is None else filled(row[task.second], path, line, task.second).strip(),
    )
