from pathlib import Path

import pytest

from adapters.data.example import LabelledText, Task
from adapters.data.formats import read
from adapters.errors import DataError
from tests.shared_files import SHARED, needs_shared

SST2 = 'sentence\tlabel\nslow , very slow \t0\na "charming" one\t1\n'
COLA = 'gj04\t1\t\tThe "cat sat.\ngj04\t0\t*\tCat the\u2028sat.\ngj04\t1\t \tIt sat.'
MRPC = (
    '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tHe said so .\t" So , he said .\r\n0\t7\t9\tYes .\tNo .\r\n'
)
RTE = 'index\tsentence1\tsentence2\tlabel\n0\tA "cat".\tA dog.\tnot_entailment\n1\tA cat.\tAn animal.\tentailment\n'

FILES = {
    "sst2": (SST2, ("negative", "positive"), (LabelledText("slow , very slow", 0), LabelledText('a "charming" one', 1))),
    "cola": (
        COLA,
        ("unacceptable", "acceptable"),
        (LabelledText('The "cat sat.', 1), LabelledText("Cat the\u2028sat.", 0), LabelledText("It sat.", 1)),
    ),
    "mrpc": (
        MRPC,
        ("not_equivalent", "equivalent"),
        (LabelledText("He said so .", 1, '" So , he said .'), LabelledText("Yes .", 0, "No .")),
    ),
    "rte": (
        RTE,
        ("entailment", "not_entailment"),
        (LabelledText('A "cat".', 1, "A dog."), LabelledText("A cat.", 0, "An animal.")),
    ),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "dev.tsv"
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_row_is_a_line_and_quotes_are_literal(tmp_path: Path, name: str) -> None:
    text, labels, items = FILES[name]
    corpus = read(write(tmp_path, text))
    assert (corpus.format, corpus.task) == (name, Task.CLASSIFICATION)
    assert (corpus.labels, corpus.items) == (labels, items)
    assert corpus.source == f"dev.tsv, {len(items)} texts, 2 classes"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sst2", SST2 + "good\n", "line 4: expected the columns sentence, label, separated by tabs, found 1 fields"),
        ("sst2", SST2 + "good\t2\n", "line 4: label is '2'; expected one of 0, 1"),
        ("sst2", SST2 + " \t1\n", "line 4: sentence is empty"),
        ("sst2", "sentence\tlabel\n", "no examples"),
        ("sst2", "", "line 1: expected the columns sentence, label"),
        ("sst2", RTE, "line 1: expected the columns sentence, label, separated by tabs, found 'index\\tsentence1"),
        ("cola", SST2, "line 1: expected the columns source, label, mark, sentence, separated by tabs, found 2 fields"),
        ("cola", "a\tb\tc\td\n", "line 1: label is 'b'; expected one of 0, 1"),
        ("mrpc", MRPC + "1\t1\t2\tYes .\t\n", "line 4: #2 String is empty"),
        ("rte", RTE + "2\ta\tb\t1\n", "line 4: label is '1'; expected one of entailment, not_entailment"),
    ],
)
def test_a_bad_row_is_refused_with_file_line_and_what_is_expected(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        read(path, name)
    assert f"{path}" in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "r1\t1\tGreat camera\tI love it.\nr2\t0\tBroken\tDoes not turn on.\n",
        COLA + "\nr1\t1\tGreat camera\tI love it.\n",
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n",  # WNLI
    ],
)
def test_other_tables_of_like_columns_are_not_taken_for_glue(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="the format is not recognised"):
        read(write(tmp_path, text))


@needs_shared
@pytest.mark.parametrize(
    ("file", "name", "rows"),
    [
        ("SST-2/train", "sst2", 67_349),
        ("SST-2/dev", "sst2", 872),
        ("CoLA/train", "cola", 8_551),
        ("CoLA/dev", "cola", 1_043),
        ("MRPC/train", "mrpc", 3_668),
        ("MRPC/dev", "mrpc", 408),
        ("RTE/train", "rte", 2_490),
        ("RTE/dev", "rte", 277),
    ],
)
def test_the_official_files_have_the_official_number_of_rows(file: str, name: str, rows: int) -> None:
    corpus = read(SHARED / "data" / "glue" / f"{file}.tsv")
    assert (corpus.format, len(corpus.items), len(corpus.labels)) == (name, rows, 2)
