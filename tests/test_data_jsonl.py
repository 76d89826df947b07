import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.data.example import Conversation, Example, LabelledText, Message
from adapters.data.formats import read
from adapters.data.jsonl import read_messages, read_plain_text, read_prompt_completion, read_text_label
from adapters.errors import DataError

Reader = Callable[[Path], object]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jsonl") / "data"


def write(path: Path, *records: object, ensure_ascii: bool = True, end: str = "\n") -> Path:
    text = "".join(json.dumps(record, ensure_ascii=ensure_ascii) + end for record in records)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def refusal(path: Path, text: str, reader: Reader) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        reader(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2: not JSON"),
        ('{"prompt": "a"}', 'line 1: expected {"prompt": "...", "completion": "..."}'),
        ('{"prompt": "a", "completion": 3}', "line 1: completion is 3; expected a string"),
        ('{"prompt": "a", "completion": "b", "extra": "c"}', "and nothing else, found the keys prompt, completion, extra"),
        ('{"prompt": "a", "completion": "b"}\n{"text": "c"}', "line 2: expected"),
        ('\n\n["a", "b"]', 'line 3: expected {"prompt": "...", "completion": "..."}, found ["a", "b"]'),
        ('{"prompt": "", "completion": "b"}', "line 1: prompt is empty"),
        ('{"prompt": "a", "completion": "\\ud800"}', "line 1: completion is not valid Unicode"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"prompt": ' + "1" * 5000 + "}", "line 1: not JSON"),
        ("\n", "no examples"),
    ],
)
def test_a_bad_prompt_or_completion_is_refused_with_file_line_and_what_is_expected(file: Path, text: str, message: str) -> None:
    assert message in refusal(file, text, read_prompt_completion)


def turns(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": "a"} for role in roles]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": []}', "line 1: messages is []; expected a list of turns"),
        ('{"messages": "hello"}', "line 1: messages is 'hello'; expected a list of turns"),
        (turns("user", "assitant"), "line 1, turn 2: role 'assitant'; expected one of system, user, assistant"),
        (turns("user", "assistant") + "\n" + turns("user"), "line 2: the last turn is the user's; expected the assistant's"),
        (turns("assistant"), "line 1: the first turn is the assistant's; expected a turn that it answers"),
        ('{"messages": [{"role": "user", "content": " "}]}', "line 1, turn 1: content is empty"),
        (
            '{"messages": [{"role": "user", "content": ["a"]}]}',
            "turn 1: {'content': ['a'], 'role': 'user'}; expected {\"role\"",
        ),
        ('{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "two strings and nothing else"),
        ('{"messages": ["a"]}', "line 1, turn 1: 'a'; expected"),
        ('{"message": []}', "found the keys message"),
    ],
)
def test_bad_turns_are_refused_with_file_line_and_what_is_expected(file: Path, text: str, message: str) -> None:
    assert message in refusal(file, text, read_messages)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a", "lable": 1}', 'expected {"text": "..."} and nothing else, found the keys text, lable'),
        ('{"text": null}', "line 1: text is None; expected a string"),
        ('{"text": "\\n"}', "line 1: text is empty"),
    ],
)
def test_bad_plain_text_is_refused_with_file_line_and_what_is_expected(file: Path, text: str, message: str) -> None:
    assert message in refusal(file, text, read_plain_text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}', "line 1: expected"),
        ('{"text": "a", "label": true}', "line 1: label is True; expected a string or a whole number"),
        ('{"text": "a", "label": 0.5}', "line 1: label is 0.5; expected a string or a whole number"),
        ('{"text": "a", "label": " "}', "line 1: label is empty"),
        (
            '{"text": "a", "label": 1}\n{"text": "a", "label": "1"}',
            "line 2: text with a label that is a string, the first line has text with a label that is a whole number",
        ),
        (
            '{"text": "a", "label": 1, "text_pair": "b"}\n{"text": "a", "label": 1}',
            "line 2: text with a label that is a whole number, the first line has text and text_pair with a label",
        ),
        ('{"text": "a", "label": 1, "second": "b"}', "found the keys text, label, second"),
        ('{"text": "a", "label": 1, "text_pair": 2}', "line 1: text_pair is 2; expected a string"),
    ],
)
def test_bad_labelled_text_is_refused_with_file_line_and_what_is_expected(file: Path, text: str, message: str) -> None:
    assert message in refusal(file, text, read_text_label)


def test_classes_are_sorted_whole_numbers_by_their_size(file: Path) -> None:
    write(file, {"text": "a", "label": "pos"}, {"text": "b", "label": "neg"})
    assert read_text_label(file) == ((LabelledText("a", 1), LabelledText("b", 0)), ("neg", "pos"))
    write(file, {"text": "a", "label": 10}, {"text": "b", "label": 9}, {"text": "c", "label": 10})
    items, labels = read_text_label(file)
    assert labels == ("9", "10") and [item.label for item in items] == [1, 0, 1]


def test_labels_are_counted_in_the_classes_of_another_file(file: Path) -> None:
    corpus = read(write(file, {"text": "a", "label": "pos"}, {"text": "b", "label": "mixed"}))
    moved = corpus.with_labels(("neg", "pos", "mixed"))
    assert moved.labels == ("neg", "pos", "mixed")
    assert moved.items == (LabelledText("a", 1), LabelledText("b", 2))
    with pytest.raises(DataError, match="data, 2 texts, 2 classes: classes mixed are unknown; expected neg, pos"):
        corpus.with_labels(("neg", "pos"))


texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: bool(text.strip()))
examples = st.builds(Example, texts, st.tuples(texts))
conversations = st.builds(
    lambda first, rest: Conversation((Message("system", first), *rest)),
    texts,
    st.lists(st.tuples(texts, texts), min_size=1, max_size=3).map(
        lambda pairs: [
            message for question, answer in pairs for message in (Message("user", question), Message("assistant", answer))
        ]
    ),
)


@settings(max_examples=30)
@given(st.lists(examples, min_size=1), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_prompts_with_completions_are_read_as_they_were_written(
    file: Path, items: list[Example], ensure_ascii: bool, end: str
) -> None:
    records = [{"prompt": item.prompt, "completion": item.completions[0]} for item in items]
    corpus = read(write(file, *records, ensure_ascii=ensure_ascii, end=end))
    assert (corpus.format, corpus.items) == ("prompt-completion", tuple(items))


@settings(max_examples=30)
@given(st.lists(texts, min_size=1), st.booleans())
def test_plain_texts_are_read_as_they_were_written(file: Path, items: list[str], ensure_ascii: bool) -> None:
    corpus = read(write(file, *[{"text": text} for text in items], ensure_ascii=ensure_ascii))
    assert (corpus.format, corpus.items) == ("text", tuple(Example("", (text,)) for text in items))


@settings(max_examples=30)
@given(st.lists(conversations, min_size=1, max_size=3), st.booleans())
def test_conversations_are_read_as_they_were_written(file: Path, items: list[Conversation], ensure_ascii: bool) -> None:
    records = [{"messages": [vars(message) for message in item.messages]} for item in items]
    corpus = read(write(file, *records, ensure_ascii=ensure_ascii))
    assert (corpus.format, corpus.items) == ("messages", tuple(items))


@settings(max_examples=30)
@given(st.lists(st.tuples(texts, texts), min_size=1), st.one_of(st.none(), texts), st.booleans())
def test_labelled_texts_are_read_as_they_were_written(
    file: Path, items: list[tuple[str, str]], pair: str | None, ensure_ascii: bool
) -> None:
    more = {} if pair is None else {"text_pair": pair}
    corpus = read(write(file, *[{"text": text, "label": label, **more} for text, label in items], ensure_ascii=ensure_ascii))
    assert corpus.format == "text-label" and corpus.labels == tuple(sorted({label for _, label in items}))
    found = [item for item in corpus.items if isinstance(item, LabelledText)]
    assert [(item.text, corpus.labels[item.label], item.second) for item in found] == [(*item, pair) for item in items]
