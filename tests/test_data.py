from pathlib import Path

import pytest

from adapters.data.e2e import read_e2e, reversed_pairs, spaced
from adapters.data.example import Example
from adapters.errors import DataError
from adapters.evaluation.slots import parse_mr, slot_coverage_counts, slot_f1_counts

MR = "name[Blue Spice], customer rating[5 out of 5], near[Café Brazil]"


def write(folder: Path, text: str) -> Path:
    path = folder / "data"
    path.write_text(text, encoding="utf-8")
    return path


def test_e2e_groups_the_references_of_a_meaning(tmp_path: Path) -> None:
    path = write(tmp_path, 'mr,ref\n"name[A], area[b]",One.\n"name[C]",Two.\n"name[A], area[b]","Three, ""so"".\nFour."\n')
    assert read_e2e(path) == (
        Example("name[A], area[b]", ("One.", 'Three, "so".\nFour.')),
        Example("name[C]", ("Two.",)),
    )


def test_only_line_ends_end_a_row_of_csv(tmp_path: Path) -> None:
    path = write(tmp_path, "mr,ref\r\nname[A\u2028B],One\x0cline.\r\n")
    assert read_e2e(path) == (Example("name[A\u2028B]", ("One\x0cline.",)),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected the columns mr, ref"),
        ("mr;ref\n", "line 1: expected the columns mr, ref"),
        ("mr,ref\n", "no examples; expected at least one"),
        ("mr,ref\na,b\nc\n", "line 3: expected the columns mr, ref, found 1 fields"),
        ("mr,ref\na, \n", "line 2: ref is empty; expected some text"),
        ('mr,ref\na,"b"c\n', "line 2: not CSV"),
    ],
)
def test_a_bad_e2e_file_is_refused_with_file_line_and_what_is_expected(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        read_e2e(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    latin = tmp_path / "latin"
    latin.write_bytes("mr,ref\nname[Café],x\n".encode("latin-1"))
    for path in (tmp_path / "absent", latin):
        with pytest.raises(DataError, match="can't be read as UTF-8 text"):
            read_e2e(path)


def test_pairs_are_reversed_and_spaced() -> None:
    examples = (Example("m", ("one  two ", "three")),)
    assert spaced(examples) == (Example("m", (" one two", " three")),)
    assert reversed_pairs(examples) == (Example("one  two ", ("m",)), Example("three", ("m",)))


def test_slots_count_when_attribute_and_value_agree() -> None:
    assert parse_mr(MR) == {("name", "blue spice"), ("customer rating", "5 out of 5"), ("near", "café brazil")}
    assert parse_mr("no slots [at all") == frozenset()
    assert slot_f1_counts([MR, "name[blue spice], near[Burger King]", ""], [MR] * 3) == [(6, 6), (2, 5), (0, 3)]


def test_coverage_asks_for_the_verbatim_slots_only() -> None:
    texts = ["BLUE SPICE is near Café Brazil.", "Blue Spice has 5 out of 5."]
    assert slot_coverage_counts(texts, [MR] * 2) == [(2, 2), (1, 2)]
