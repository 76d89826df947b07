"""Every format of a data file that training and evaluation read: what it looks like, and its reader."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapters.data import glue, jsonl, triples
from adapters.data.e2e import E2E_COLUMNS, read_e2e, spaced
from adapters.data.example import Conversation, Corpus, Example, LabelledText, Task
from adapters.data.text_file import lines_of, read_opening
from adapters.errors import DataError

Items = tuple[Example, ...] | tuple[Conversation, ...] | tuple[LabelledText, ...]
Contents = tuple[Items, tuple[str, ...]]
"""A file's items, and the classes' names."""


@dataclass(frozen=True)
class Format:
    """One format of a data file.

    Attributes:
        title: what it is called.
        looks_like: its form, in one line.
        task: what an adapter is trained for with it.
        metrics: what is usual to measure on it, besides the loss.
        recognises: whether a file is of it, from the file's opening.
        read: reads a file. Raises DataError, with the file, the line and what was expected.
    """

    title: str
    looks_like: str
    task: Task
    metrics: tuple[str, ...]
    recognises: Callable[[str], bool]
    read: Callable[[Path], Contents]


def read(path: Path, format: str | None = None) -> Corpus:
    """Read a data file, whose format is recognised from its content where `format` doesn't name it.

    The texts are as the model is to see them: in the corpora E2E, WebNLG and DART a completion starts with the space that
    sets it off from its prompt, and runs of white space are one space. JSON lines are taken as they stand.

    Raises:
        DataError: the file can't be read, is of no known format, or isn't of the format; names the file, the line, and
            what was expected.
    """
    name = _recognised(path) if format is None else format
    if name not in FORMATS:
        raise DataError(f"format {name[:80]!r} is not one of {', '.join(FORMATS)}")
    items, labels = FORMATS[name].read(path)
    return Corpus(name, FORMATS[name].task, items, labels, f"{path.name}, {_counted(items, labels)}")


def _recognised(path: Path) -> str:
    opening = read_opening(path)
    if not opening.strip():
        raise DataError(f"{path}: no examples; expected at least one")
    for name, form in FORMATS.items():
        if form.recognises(opening):
            return name
    first = next(line for _, line in lines_of(opening))
    known = "\n".join(f"  {name}: {form.title}, {form.looks_like}" for name, form in FORMATS.items())
    raise DataError(f"{path}: the format is not recognised; it starts {first[:80]!r}; expected one of\n{known}")


def _counted(items: Items, labels: tuple[str, ...]) -> str:
    if labels:
        return f"{len(items)} texts, {len(labels)} classes"
    examples = [item for item in items if isinstance(item, Example)]
    if not examples:
        return f"{len(items)} conversations"
    if not any(example.prompt for example in examples):
        return f"{len(items)} texts"
    return f"{len(items)} prompts, {sum(len(example.completions) for example in examples)} references"


def _has_keys(*keys: str, without: str = "") -> Callable[[str], bool]:
    """Whether the first line is a JSON object with one of `keys`, and not with `without`."""

    def recognises(opening: str) -> bool:
        found = jsonl.first_keys(opening)
        return not found.isdisjoint(keys) and without not in found

    return recognises


def _is_e2e(opening: str) -> bool:
    return next((line for _, line in lines_of(opening)), "").replace('"', "") == ",".join(E2E_COLUMNS)


def _is_webnlg(opening: str) -> bool:
    return re.match(r'\s*\{\s*"entries"\s*:', opening) is not None


def _is_dart(opening: str) -> bool:
    return opening.lstrip().startswith("[") and '"tripleset"' in opening


def _unlabelled(reader: Callable[[Path], Items]) -> Callable[[Path], Contents]:
    return lambda path: (reader(path), ())


def _spaced(reader: Callable[[Path], tuple[Example, ...]]) -> Callable[[Path], Contents]:
    return lambda path: (spaced(reader(path)), ())


def _glue(title: str, task: glue.GlueTask, metrics: tuple[str, ...]) -> Format:
    header = "with the header" if task.has_header else "without a header,"
    return Format(
        f"GLUE's {title}",
        f"tab-separated {header} {', '.join(task.columns)}",
        Task.CLASSIFICATION,
        metrics,
        task.recognises,
        lambda path: (glue.read_glue(path, task), task.labels),
    )


_TEXT_METRICS = ("bleu", "chrf", "rouge_l")
_generation = partial(Format, task=Task.CAUSAL_LM, metrics=_TEXT_METRICS)

FORMATS: dict[str, Format] = {
    "prompt-completion": _generation(
        "JSON lines",
        jsonl.PROMPT_COMPLETION,
        recognises=_has_keys("prompt", "completion"),
        read=_unlabelled(jsonl.read_prompt_completion),
    ),
    "messages": _generation(
        "JSON lines", jsonl.MESSAGES, recognises=_has_keys("messages"), read=_unlabelled(jsonl.read_messages)
    ),
    "text-label": Format(
        "JSON lines",
        f"{jsonl.TEXT_LABEL} or {jsonl.TEXT_PAIR_LABEL}",
        Task.CLASSIFICATION,
        ("accuracy",),
        _has_keys("label", "text_pair"),
        jsonl.read_text_label,
    ),
    "text": Format(
        "JSON lines",
        jsonl.TEXT,
        Task.CAUSAL_LM,
        (),
        _has_keys("text", without="label"),
        _unlabelled(jsonl.read_plain_text),
    ),
    "e2e": _generation(
        "the E2E NLG challenge", f"CSV with the header {','.join(E2E_COLUMNS)}", recognises=_is_e2e, read=_spaced(read_e2e)
    ),
    "webnlg": _generation(
        "the WebNLG challenge 2017", f"JSON {triples.WEBNLG}", recognises=_is_webnlg, read=_spaced(triples.read_webnlg)
    ),
    "dart": _generation("DART v1.1.1", f"JSON {triples.DART}", recognises=_is_dart, read=_spaced(triples.read_dart)),
    "sst2": _glue("SST-2", glue.SST2, ("accuracy",)),
    "cola": _glue("CoLA", glue.COLA, ("matthews",)),
    "mrpc": _glue("MRPC", glue.MRPC, ("accuracy", "f1")),
    "rte": _glue("RTE", glue.RTE, ("accuracy",)),
}
"""Format's name -> format, in the order in which a file is tried."""
