"""The texts at hand, to pretrain the bases on: sentences and linearised facts, and never the one beside the other.

Only training files are read, and DART, whose training file isn't at hand: nothing that a run is measured on.
"""

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapters.data.e2e import read_e2e
from adapters.data.text_file import read_text

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
    return Corpus(tuple(_groups(data, "train")) + tuple(_dart(data)), tuple(_groups(data, "dev")))


def _groups(data: Path, split: str) -> Iterator[Group]:
    for example in read_e2e(data / "e2e" / f"{split}set.csv"):
        yield tuple(_tidy(text) for text in example.completions)
        yield (_tidy(example.prompt),)
    yield from _webnlg(data / "webnlg2017" / f"{split}.json")
    glue = data / "glue"
    yield from _columns(glue / "SST-2" / f"{split}.tsv", (0,))
    yield from _columns(glue / "CoLA" / f"{split}.tsv", (3,), has_header=False)
    yield from _columns(glue / "MRPC" / f"{split}.tsv", (3, 4))
    yield from _columns(glue / "RTE" / f"{split}.tsv", (1, 2))


def _webnlg(path: Path) -> Iterator[Group]:
    grouped: dict[str, list[str]] = {}
    for numbered in json.loads(read_text(path))["entries"]:
        for entry in numbered.values():
            triples = [(t["subject"], t["property"], t["object"]) for t in entry["modifiedtripleset"]]
            texts = [_tidy(text["lex"]) for text in entry["lexicalisations"] if text["comment"] != "toFix"]
            if texts:
                grouped.setdefault(_linearised(triples), []).extend(texts)
    for prompt, texts in grouped.items():
        yield tuple(texts)
        yield (prompt,)


def _dart(data: Path) -> Iterator[Group]:
    grouped: dict[str, list[str]] = {}
    for entry in json.loads(read_text(data / "dart" / "dart-v1.1.1-full-dev.json")):
        triples = [(subject, relation.lower(), target) for subject, relation, target in entry["tripleset"]]
        grouped.setdefault(_linearised(triples), []).extend(_tidy(text["text"]) for text in entry["annotations"])
    for prompt, texts in grouped.items():
        yield tuple(texts)
        yield (prompt,)


def _linearised(triples: list[tuple[str, str, str]]) -> str:
    return _tidy(" | ".join(" : ".join(triple) for triple in triples))


def _columns(path: Path, columns: tuple[int, ...], has_header: bool = True) -> Iterator[Group]:
    rows = csv.reader(read_text(path).split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
    for row in itertools.islice(filter(None, rows), int(has_header), None):
        yield tuple(_tidy(row[i]) for i in columns)


def _tidy(text: str) -> str:
    return " ".join(text.split())
