"""The texts at hand, to pretrain the bases on: sentences and linearised facts, and never the one beside the other.

Only training files are read, and DART, whose training file isn't at hand: nothing that a run is measured on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapters.data.example import Example, LabelledText
from adapters.data.formats import read

Group = tuple[str, ...]
"""Texts that belong together: the references of one meaning, the two sentences of a pair; or one alone."""


@dataclass(frozen=True)
class Corpus:
    """Texts to pretrain on.

    Attributes:
        groups: to train on.
        held_out: from the official development files, to measure a base on.
    """

    groups: tuple[Group, ...]
    held_out: tuple[Group, ...]


def read_corpus(data: Path) -> Corpus:
    """Read every text under `data`, laid out as `python -m adapters.paper --help` says. Raises DataError."""
    dart = _groups(data / "dart" / "dart-v1.1.1-full-dev.json")
    return Corpus((*_split(data, "train"), *dart), tuple(_split(data, "dev")))


def _split(data: Path, split: str) -> Iterator[Group]:
    yield from _groups(data / "e2e" / f"{split}set.csv")
    yield from _groups(data / "webnlg2017" / f"{split}.json")
    for task in ("SST-2", "CoLA", "MRPC", "RTE"):
        yield from _groups(data / "glue" / task / f"{split}.tsv")


def _groups(path: Path) -> Iterator[Group]:
    for item in read(path).items:
        if isinstance(item, Example):
            yield tuple(_tidy(text) for text in item.completions)
            yield (_tidy(item.prompt),)
        elif isinstance(item, LabelledText):
            yield tuple(_tidy(text) for text in (item.text, item.second) if text is not None)


def _tidy(text: str) -> str:
    return " ".join(text.split())
