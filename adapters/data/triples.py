"""Sets of triples with texts that say them: WebNLG (Gardent et al. 2017) and DART (Nan et al. 2021), in their JSON files.

A set of triples becomes a prompt as in the LoRA paper's code (Hu et al. 2021, arXiv 2106.09685, `format_converting_*.py`),
so that figures compare: `subject : property : object`, several joined by ` | `; WebNLG's names as they stand, with
underscores, DART's properties in lower case; WebNLG's texts marked `toFix` left out.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from reprlib import repr as shortened  # a value may be large, or deeply nested

from adapters.data.example import Example
from adapters.data.text_file import filled, not_empty, read_text
from adapters.errors import DataError

WEBNLG = '{"entries": [{"1": {"modifiedtripleset": [...], "lexicalisations": [...]}}]}'
DART = '[{"tripleset": [["...", "...", "..."]], "annotations": [{"text": "..."}]}]'

_WEBNLG_TRIPLE = '{"subject": "...", "property": "...", "object": "..."}'
_WEBNLG_TEXT = '{"lex": "...", "comment": "..."}'
_DART_TRIPLE = '["subject", "property", "object"]'
_DART_TEXT = '{"text": "..."}'

Triple = tuple[str, str, str]


def read_webnlg(path: Path) -> tuple[Example, ...]:
    """Read a JSON file of the WebNLG challenge.

    Returns:
        one Example per distinct set of triples, in order of first appearance, with all of its texts.

    Raises:
        DataError: the file can't be read, or an entry isn't of WebNLG's form; names the file and the entry.
    """
    match _document(path, WEBNLG):
        case {"entries": [*entries]}:
            return _grouped(_webnlg_pairs(entries, path), path)
    raise DataError(f"{path}: expected {WEBNLG}")


def read_dart(path: Path) -> tuple[Example, ...]:
    """Read a JSON file of DART; returns and raises as `read_webnlg` does."""
    match _document(path, DART):
        case [*entries]:
            return _grouped(_dart_pairs(entries, path), path)
    raise DataError(f"{path}: expected {DART}")


def linearised(triples: Iterable[Triple]) -> str:
    """The prompt for a set of triples."""
    return " | ".join(" : ".join(triple) for triple in triples)


def _webnlg_pairs(entries: list[object], path: Path) -> Iterator[tuple[str, str]]:
    for number, entry in enumerate(entries, start=1):
        place = f"entry {number}"
        # each entry is an object of one key, its number
        match list(entry.values()) if isinstance(entry, dict) else None:
            case [{"modifiedtripleset": [_, *_] as triples, "lexicalisations": [*texts]}]:
                prompt = linearised(_webnlg_triple(triple, path, place) for triple in triples)
                yield from ((prompt, text) for text in _webnlg_texts(texts, path, place))
            case _:
                raise _unexpected(path, place, entry, WEBNLG)


def _webnlg_triple(triple: object, path: Path, place: str) -> Triple:
    match triple:
        case {"subject": str(subject), "property": str(relation), "object": str(target)}:
            return _filled_triple((subject, relation, target), path, place)
    raise _unexpected(path, place, triple, _WEBNLG_TRIPLE)


def _webnlg_texts(texts: list[object], path: Path, place: str) -> Iterator[str]:
    for text in texts:
        match text:
            case {"lex": str(lex), "comment": str(comment)}:
                if comment != "toFix":
                    yield filled(lex, path, place, "lex")
            case _:
                raise _unexpected(path, place, text, _WEBNLG_TEXT)


def _dart_pairs(entries: list[object], path: Path) -> Iterator[tuple[str, str]]:
    for number, entry in enumerate(entries, start=1):
        place = f"entry {number}"
        match entry:
            case {"tripleset": [_, *_] as triples, "annotations": [_, *_] as texts}:
                prompt = linearised(_dart_triple(triple, path, place) for triple in triples)
                yield from ((prompt, _dart_text(text, path, place)) for text in texts)
            case _:
                raise _unexpected(path, place, entry, DART)


def _dart_triple(triple: object, path: Path, place: str) -> Triple:
    match triple:
        case [str(subject), str(relation), str(target)]:
            return _filled_triple((subject, relation.lower(), target), path, place)
    raise _unexpected(path, place, triple, _DART_TRIPLE)


def _dart_text(annotation: object, path: Path, place: str) -> str:
    match annotation:
        case {"text": str(text)}:
            return filled(text, path, place, "text")
    raise _unexpected(path, place, annotation, _DART_TEXT)


def _filled_triple(triple: Triple, path: Path, place: str) -> Triple:
    for part, what in zip(triple, ("subject", "property", "object"), strict=True):
        filled(part, path, place, what)
    return triple


def _grouped(pairs: Iterable[tuple[str, str]], path: Path) -> tuple[Example, ...]:
    texts: dict[str, list[str]] = {}
    for prompt, text in pairs:
        texts.setdefault(prompt, []).append(text)
    return not_empty(tuple(Example(prompt, tuple(found)) for prompt, found in texts.items()), path)


def _document(path: Path, expected: str) -> object:
    try:
        document: object = json.loads(read_text(path))
    # ValueError: not JSON, or an integer of too many digits. RecursionError: nested too deeply.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); expected {expected}") from error
    return document


def _unexpected(path: Path, place: str, found: object, expected: str) -> DataError:
    return DataError(f"{path}, {place}: expected {expected}, found {shortened(found)}")
