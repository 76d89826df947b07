"""JSON lines: prompts with completions, conversations, plain texts, and labelled texts.

A file is of one kind throughout. Keys other than the kind's own are refused, so that a misspelt one is noticed. Texts are
taken as they stand: no space is put before a completion.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as shortened  # a value may be large, or deeply nested

from adapters.data.example import Conversation, Example, LabelledText, Message
from adapters.data.text_file import filled, lines_of, not_empty, read_text
from adapters.errors import DataError

PROMPT_COMPLETION = '{"prompt": "...", "completion": "..."}'
MESSAGES = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
TEXT = '{"text": "..."}'
TEXT_LABEL = '{"text": "...", "label": "..."}'
TEXT_PAIR_LABEL = '{"text": "...", "text_pair": "...", "label": "..."}'
"""`text_pair` is what transformers' tokenizers call the second text."""

ROLES = ("system", "user", "assistant")


def read_prompt_completion(path: Path) -> tuple[Example, ...]:
    """Read lines of `PROMPT_COMPLETION`; each is one Example.

    Raises:
        DataError: the file can't be read, or a line isn't of that form; names the file and the line.
    """
    return not_empty(
        tuple(
            Example(_text(record, "prompt", path, line), (_text(record, "completion", path, line),))
            for line, record in _records(path, PROMPT_COMPLETION)
        ),
        path,
    )


def read_plain_text(path: Path) -> tuple[Example, ...]:
    """Read lines of `TEXT`; each is one Example without a prompt. Raises DataError, as `read_prompt_completion` does."""
    return not_empty(tuple(Example("", (_text(record, "text", path, line),)) for line, record in _records(path, TEXT)), path)


def read_messages(path: Path) -> tuple[Conversation, ...]:
    """Read lines of `MESSAGES`; each is one Conversation, with any number of turns.

    Raises:
        DataError: as `read_prompt_completion` does; a role isn't one of ROLES; the first turn is the assistant's; or the
            last one isn't, so that nothing could be trained on it.
    """
    return not_empty(
        tuple(_conversation(record["messages"], path, line) for line, record in _records(path, MESSAGES)),
        path,
    )


def read_text_label(path: Path) -> tuple[tuple[LabelledText, ...], tuple[str, ...]]:
    """Read lines of `TEXT_LABEL`, or lines of `TEXT_PAIR_LABEL`. The labels are all strings or all whole numbers.

    Returns:
        one LabelledText per line, and the classes' names: sorted, whole numbers by their size.

    Raises:
        DataError: as `read_prompt_completion` does.
    """
    rows, shape = list(_records(path, TEXT_LABEL, TEXT_PAIR_LABEL)), None
    for line, record in rows:
        found = ("text_pair" in record, _label_kind(record["label"], path, line))
        shape = shape or found
        if found != shape:
            raise DataError(
                f"{path}, line {line}: {_described(*found)}, the first line has {_described(*shape)}; expected one kind"
            )
    # of one type, so that they compare; mypy can't know
    values = sorted({record["label"] for _, record in rows})  # type: ignore[type-var]
    index = {value: i for i, value in enumerate(values)}
    items = tuple(
        LabelledText(
            _text(record, "text", path, line),
            index[record["label"]],
            _text(record, "text_pair", path, line) if "text_pair" in record else None,
        )
        for line, record in rows
    )
    return not_empty(items, path), tuple(str(value) for value in values)


def first_keys(opening: str) -> frozenset[str]:
    """The keys of the first line; none if it isn't a JSON object."""
    line = next((text for _, text in lines_of(opening)), "")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return frozenset()
    return frozenset(record) if isinstance(record, dict) else frozenset()


def _records(path: Path, *shapes: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Every line's object, which has the keys of one of `shapes`."""
    keys = [json.loads(shape).keys() for shape in shapes]
    expected = f"expected {' or '.join(shapes)}"
    for line, text in lines_of(read_text(path)):
        try:
            record = json.loads(text)
        # ValueError: not JSON, or an integer of too many digits. RecursionError: nested too deeply.
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: not JSON ({error}); {expected}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {line}: {expected}, found {text[:80]}")
        if record.keys() not in keys:
            found = ", ".join(record) or "none"
            raise DataError(f"{path}, line {line}: {expected} and nothing else, found the keys {found}")
        yield line, record


def _text(record: dict[str, object], key: str, path: Path, line: int) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f"{path}, line {line}: {key} is {shortened(value)}; expected a string")
    return filled(value, path, line, key)


def _conversation(turns: object, path: Path, line: int) -> Conversation:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{path}, line {line}: messages is {shortened(turns)}; expected a list of turns, {MESSAGES}")
    messages = [_message(turn, path, line, number) for number, turn in enumerate(turns, start=1)]
    if messages[-1].role != "assistant":
        raise DataError(f"{path}, line {line}: the last turn is the {messages[-1].role}'s; expected the assistant's")
    if messages[0].role == "assistant":
        raise DataError(f"{path}, line {line}: the first turn is the assistant's; expected a turn that it answers")
    return Conversation(tuple(messages))


def _message(turn: object, path: Path, line: int, number: int) -> Message:
    match turn:
        case {"role": str(role), "content": str(content), **others} if not others:
            if role not in ROLES:
                raise DataError(f"{path}, line {line}, turn {number}: role {role[:80]!r}; expected one of {', '.join(ROLES)}")
            return Message(role, filled(content, path, f"line {line}, turn {number}", "content"))
    raise DataError(
        f"{path}, line {line}, turn {number}: {shortened(turn)}; "
        'expected {"role": "...", "content": "..."}, two strings and nothing else'
    )


def _label_kind(label: object, path: Path, line: int) -> type:
    if isinstance(label, str):
        filled(label, path, line, "label")
    elif not isinstance(label, int) or isinstance(label, bool):
        raise DataError(f"{path}, line {line}: label is {shortened(label)}; expected a string or a whole number")
    return type(label)


def _described(has_pair: bool, kind: type) -> str:
    texts = "text and text_pair" if has_pair else "text"
    return f"{texts} with a label that is {'a string' if kind is str else 'a whole number'}"
