import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.data.example import Example, Task
from adapters.data.formats import FORMATS, read
from adapters.errors import DataError
from tests.shared_files import SHARED, needs_shared


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats") / "data"


def triple(subject: str, relation: str, target: str) -> dict[str, str]:
    return {"subject": subject, "property": relation, "object": target}


def text(lex: str, comment: str = "good") -> dict[str, str]:
    return {"comment": comment, "lang": "", "lex": lex, "xml_id": "Id1"}


def webnlg(*entries: tuple[list[dict[str, str]], list[dict[str, str]]]) -> dict[str, object]:
    return {
        "entries": [
            {str(i): {"category": "Airport", "modifiedtripleset": triples, "lexicalisations": texts}}
            for i, (triples, texts) in enumerate(entries, start=1)
        ]
    }


A, B = triple("Aarhus", "leaderName", "Jacob_B"), triple("Aarhus", "country", '"Denmark"')
WEBNLG = webnlg(
    ([A, B], [text("Jacob  B leads Aarhus."), text("Aarhus, Jacob B.", "toFix")]),
    ([A], [text("He leads.")]),
    ([B], [text("Denmark", "toFix")]),
    ([A, B], [text("It is led.")]),
)
DART = [
    {
        "tripleset": [["Mars Hill", "JOINED", "1973"], ["Mars Hill", "Loc", "NC"]],
        "annotations": [{"source": "x", "text": "It."}],
    },
    {"annotations": [{"text": "One."}, {"text": "Two."}], "tripleset": [["a", "b", "c"]], "subtree_was_extended": False},
]


def write(folder: Path, content: object, indent: int | None = None) -> Path:
    path = folder / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=indent), encoding="utf-8")
    return path


@pytest.mark.parametrize("indent", [None, 4])
def test_webnlg_gives_one_example_for_each_set_of_triples(tmp_path: Path, indent: int | None) -> None:
    corpus = read(write(tmp_path, WEBNLG, indent))
    assert (corpus.format, corpus.task, corpus.labels) == ("webnlg", Task.CAUSAL_LM, ())
    assert corpus.items == (
        Example('Aarhus : leaderName : Jacob_B | Aarhus : country : "Denmark"', (" Jacob B leads Aarhus.", " It is led.")),
        Example("Aarhus : leaderName : Jacob_B", (" He leads.",)),
    )
    assert corpus.source == "data.json, 2 prompts, 3 references"


@pytest.mark.parametrize("indent", [None, 2])
def test_dart_gives_one_example_for_each_set_of_triples(tmp_path: Path, indent: int | None) -> None:
    corpus = read(write(tmp_path, DART, indent))
    assert corpus.format == "dart"
    assert corpus.items == (
        Example("Mars Hill : joined : 1973 | Mars Hill : loc : NC", (" It.",)),
        Example("a : b : c", (" One.", " Two.")),
    )


def test_e2e_is_read_as_a_model_is_to_see_it(tmp_path: Path) -> None:
    corpus = read(write(tmp_path, '"mr","ref"\nname[A],One  two.\nname[A],Three.\n'))
    assert (corpus.format, corpus.source) == ("e2e", "data.json, 1 prompts, 2 references")
    assert corpus.items == (Example("name[A]", (" One two.", " Three.")),)


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("webnlg", '{"entries": [', "not JSON"),
        ("webnlg", "[" * 100_000, "not JSON"),
        ("webnlg", DART, 'expected {"entries"'),
        ("webnlg", {"entries": [{"1": {"lexicalisations": []}}]}, 'entry 1: expected {"entries"'),
        ("webnlg", {"entries": [{}]}, "entry 1: expected"),
        ("webnlg", webnlg(([A], [text("a")]), ([], [text("a")])), "entry 2: expected"),
        ("webnlg", webnlg(([{"subject": "a"}], [text("a")])), 'entry 1: expected {"subject": "...", "property"'),
        ("webnlg", webnlg(([A], [{"lex": "a"}])), 'entry 1: expected {"lex": "...", "comment": "..."}'),
        ("webnlg", webnlg(([triple("a", " ", "b")], [text("a")])), "entry 1: property is empty"),
        ("webnlg", webnlg(([A], [text("")])), "entry 1: lex is empty"),
        ("webnlg", webnlg(([A], [text("a", "toFix")])), "no examples"),
        ("dart", WEBNLG, 'expected [{"tripleset"'),
        ("dart", ["a"], 'entry 1: expected [{"tripleset"'),
        ("dart", [*DART, {"tripleset": [], "annotations": [{"text": "a"}]}], "entry 3: expected"),
        ("dart", [{"tripleset": [["a", "b"]], "annotations": [{"text": "a"}]}], 'entry 1: expected ["subject", "property"'),
        ("dart", [{"tripleset": [["a", "b", "c"]], "annotations": [{"text": 1}]}], 'entry 1: expected {"text": "..."}'),
        ("dart", [], "no examples"),
        ("e2e", WEBNLG, "line 1: expected the columns mr, ref"),
        ("bleurgh", WEBNLG, "format 'bleurgh' is not one of prompt-completion, messages"),
    ],
)
def test_a_bad_file_is_refused_with_the_place_and_what_is_expected(
    tmp_path: Path, format: str, content: object, message: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read(path, format)
    assert message in str(caught.value)
    assert format == "bleurgh" or str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["# Read me\n", '{"a": 1}\n', '[{"prompt": "a"}]', "sentence,label\n", "x" * 200_000])
def test_a_file_of_no_known_format_is_answered_with_all_that_are(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read(path)
    first, *lines = str(caught.value).split("\n")
    assert first == f"{path}: the format is not recognised; it starts {content.strip()[:80]!r}; expected one of"
    assert [line.split(":")[0].strip() for line in lines] == list(FORMATS)


def test_an_empty_file_and_an_absent_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.json: no examples"):
        read(write(tmp_path, "\n \n"))
    with pytest.raises(DataError, match="absent: can't be read"):
        read(tmp_path / "absent")


def test_a_misspelt_key_does_not_hide_the_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: .* found the keys prompt, completoin"):
        read(write(tmp_path, '{"prompt": "a", "completoin": "b"}\n'))


def test_a_first_line_of_any_length_is_recognised(tmp_path: Path) -> None:
    assert read(write(tmp_path, {"text": "é " * 100_000})).format == "text"


VALID = {
    "prompt-completion": '{"prompt": "a", "completion": "b"}\n',
    "messages": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    "text-label": '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n',
    "text": '{"text": "a"}\n',
    "e2e": 'mr,ref\nname[A],"One."\n',
    "webnlg": json.dumps(WEBNLG),
    "dart": json.dumps(DART),
    "sst2": "sentence\tlabel\na\t0\n",
    "cola": "gj04\t1\t*\ta\n",
    "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta\tb\n",
    "rte": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_recognised(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path, VALID[name])).format == name


@settings(max_examples=200)
@given(st.sampled_from(list(FORMATS)), st.data())
def test_a_damaged_file_is_read_or_refused(file: Path, name: str, data: st.DataObject) -> None:
    text = VALID[name]
    start, end = sorted((data.draw(st.integers(0, len(text))), data.draw(st.integers(0, len(text)))))
    damage = data.draw(st.text(max_size=3) | st.sampled_from(["null", "[]", "{}", "1", '"', "\ud800", "\x00", "\t", "\n"]))
    file.write_bytes((text[:start] + damage + text[end:]).encode("utf-8", "surrogatepass"))
    for format in (name, None):
        try:
            assert len(read(file, format).items) > 0
        except DataError as error:
            assert str(file) in str(error)


@needs_shared
@pytest.mark.parametrize(
    ("file", "format", "source"),
    [
        ("e2e/trainset.csv", "e2e", "4862 prompts, 42061 references"),
        ("e2e/devset.csv", "e2e", "547 prompts, 4672 references"),
        ("webnlg2017/train.json", "webnlg", "6888 prompts, 18025 references"),
        ("webnlg2017/dev.json", "webnlg", "870 prompts, 2258 references"),
        ("dart/dart-v1.1.1-full-dev.json", "dart", "2721 prompts, 6980 references"),
    ],
)
def test_the_official_files_are_recognised_and_read_whole(file: str, format: str, source: str) -> None:
    corpus = read(SHARED / "data" / file)
    assert (corpus.format, corpus.source) == (format, f"{Path(file).name}, {source}")
    examples = [item for item in corpus.items if isinstance(item, Example)]
    assert len({example.prompt for example in examples}) == len(corpus.items)
    assert all(text.startswith(" ") and text[1] != " " for example in examples for text in example.completions)
