"""The texts at hand, to pretrain the bases on: sentences and linearised facts, and never the one beside the other.

Only training files are read, and DART, whose training file isn't at hand: nothing that a run is measured on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from adapters.data.example import Example, LabelledText
from adapters.data.formats import read

Group = tuple[str, ...]
"""Texts that belong together: the references of one meaning, the two sentences of a pair; or one alone."""


class Source(StrEnum):
    """Where texts come from: a folder of the data."""

    E2E = "e2e"
    WEBNLG = "webnlg2017"
    DART = "dart"
    GLUE = "glue"


_FILES = {
    Source.E2E: ("{}set.csv",),
    Source.WEBNLG: ("{}.json",),
    Source.GLUE: tuple(f"{task}/{{}}.tsv" for task in ("SST-2", "CoLA", "MRPC", "RTE")),
}
_DART_FILE = "dart-v1.1.1-full-dev.json"


@dataclass(frozen=True)
class Corpus:
    """Texts to pretrain on.

    Attributes:
        groups: one epoch to train on.
        held_out: from the official development files, to measure a base on.
    """

    groups: tuple[Group, ...]
    held_out: tuple[Group, ...]


def read_corpus(data: Path, shares: Mapping[Source, int]) -> Corpus:
    """Read the texts under `data`, laid out as `python -m adapters.paper --help` says.

    Args:
        shares: how often an epoch has each source's texts; a source that isn't named is left out.

    Raises:
        DataError: a file is missing, or isn't what it should be.
    """
    train: list[Group] = []
    held_out: list[Group] = []
    for source, times in shares.items():
        train += times * list(_texts(data / source, source, "train"))
        held_out += _texts(data / source, source, "dev")
    return Corpus(tuple(train), tuple(held_out))


def _texts(folder: Path, source: Source, split: str) -> Iterator[Group]:
    if source is Source.DART:  # its development file is all there is, and is trained on
        yield from _groups(folder / _DART_FILE) if split == "train" else ()
        return
    for name in _FILES[source]:
        yield from _groups(folder / name.format(split))


def _groups(path: Path) -> Iterator[Group]:
    for item in read(path).items:
        if isinstance(item, Example):
            yield tuple(_tidy(text) for text in item.completions)
            yield (_tidy(item.prompt),)
        elif isinstance(item, LabelledText):
            yield tuple(_tidy(text) for text in (item.text, item.second) if text is not None)


def _tidy(text: str) -> str:
    return " ".join(text.split())
