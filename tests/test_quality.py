"""quality.json: what is written is read, and what is wrong is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import InvalidAdapter
from adapters.quality import MAX_QUALITY_BYTES, QUALITY_FILE, Metric, QualityProfile

PROFILE = QualityProfile(
    metrics=(
        Metric("rouge_l", True, {1: 0.25, 2: 0.5, 8: 0.75}),
        Metric("loss", False, {1: 1.5, 8: 0.9}),
    ),
    source="E2E dev, 400 references, greedy",
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / QUALITY_FILE
    PROFILE.save(path)
    assert QualityProfile.load(path, r_max=8) == PROFILE


def test_intervals_base_and_examples_are_optional_and_survive(tmp_path: Path) -> None:
    full = QualityProfile(
        (Metric("loss", False, {1: 1.5, 8: 0.9}, intervals={1: (1.4, 1.6)}, base=4.25), *PROFILE.metrics[:1]), "x", examples=547
    )
    full.save(tmp_path / QUALITY_FILE)
    assert QualityProfile.load(tmp_path / QUALITY_FILE, r_max=8) == full
    assert set(PROFILE.to_json()) == {"metrics", "source"}
    assert set(PROFILE.to_json()["metrics"][0]) == {"name", "higher_is_better", "values"}


def test_a_profile_is_cut_to_lower_ranks_with_its_intervals() -> None:
    whole = QualityProfile((Metric("loss", False, {2: 1.5, 8: 0.9}, intervals={2: (1.4, 1.6), 8: (0.8, 1.0)}),), "x")
    assert whole.up_to(4) == QualityProfile((Metric("loss", False, {2: 1.5}, intervals={2: (1.4, 1.6)}),), "x")
    assert whole.up_to(1) is None


def test_the_first_metric_decides() -> None:
    assert QualityProfile.from_json(PROFILE.to_json(), r_max=8).primary.name == "rouge_l"


def test_ranks_are_written_in_numeric_order() -> None:
    profile = QualityProfile((Metric("m", True, {16: 1.0, 2: 0.5}),), "x")
    assert list(profile.to_json()["metrics"][0]["values"]) == ["2", "16"]


def _with(**metric: Any) -> dict[str, Any]:
    return {"metrics": [{"name": "m", "higher_is_better": True, "values": {"1": 0.5}, **metric}], "source": "s"}


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        ([], ["quality.json: content must be an object with the keys examples, metrics, source"]),
        ({"source": "s"}, ["quality.json: metrics must be a list of 1 to 32 metrics"]),
        ({"metrics": [], "source": "s"}, ["metrics must be a list of 1 to 32 metrics"]),
        ({**_with(), "extra": 1}, ["unknown key 'extra'; legal: examples, metrics, source"]),
        ({**_with(), "source": 3}, ["source must be a string of at most 1000 characters, not '3'"]),
        ({**_with(), "source": "\ud800"}, ["source must be a string"]),
        ({"metrics": _with()["metrics"] * 33, "source": ""}, ["metrics must be a list of 1 to 32 metrics"]),
        (_with(name=""), ["metrics[0].name must be a string of 1 to 100 characters"]),
        (_with(higher_is_better=1), ["metrics[0].higher_is_better must be true or false, not '1'"]),
        (_with(values={}), ["metrics[0].values must be an object from rank to value"]),
        (_with(values={"9": 0.5}), ["metrics[0].values must be ranks 1..8 as keys, not '9'"]),
        (_with(values={"01": 0.5}), ["must be ranks 1..8 as keys, not '01'"]),
        (_with(values={"٣": 0.5}), ["must be ranks 1..8 as keys"]),
        (_with(values={"1": float("nan")}), ["metrics[0].values.1 must be a finite number, not 'nan'"]),
        (_with(values={"1": 10**400}), ["metrics[0].values.1 must be a finite number"]),
        (_with(values={"1": True}), ["metrics[0].values.1 must be a finite number, not 'True'"]),
        ({"metrics": _with()["metrics"] * 2, "source": ""}, ["the name 'm' appears more than once"]),
        ({**_with(), "examples": 0}, ["examples must be a whole number of at least 1, not '0'"]),
        ({**_with(), "examples": True}, ["examples must be a whole number of at least 1, not 'True'"]),
        (_with(base="low"), ["metrics[0].base must be a finite number, not 'low'"]),
        (_with(intervals=[0.4, 0.6]), ["metrics[0].intervals must be an object from rank to [lower, upper]"]),
        (_with(intervals={"9": [0.4, 0.6]}), ["metrics[0].intervals must be ranks 1..8 as keys, not '9'"]),
        (_with(intervals={"1": [0.6, 0.4]}), ["metrics[0].intervals.1 must be two finite numbers, the lower one first"]),
        (_with(intervals={"1": [0.4]}), ["metrics[0].intervals.1 must be two finite numbers"]),
        (_with(intervals={"1": [0.4, None]}), ["metrics[0].intervals.1 must be two finite numbers"]),
        (_with(intervals={"2": [0.4, 0.6]}), ["metrics[0].intervals.2 is of a rank that has no value"]),
        (_with(name=3, values={"0": 1}), ["metrics[0].name must be", "must be ranks 1..8 as keys, not '0'"]),
    ],
)
def test_every_problem_is_named(data: object, messages: list[str]) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        QualityProfile.from_json(data, r_max=8)
    for message in messages:
        assert message in str(caught.value)
    assert len(caught.value.problems) == len(messages)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b" " * (MAX_QUALITY_BYTES + 1)])
def test_a_file_that_is_not_json_is_invalid(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / QUALITY_FILE
    path.write_bytes(content)
    with pytest.raises(InvalidAdapter, match=r"quality\.json"):
        QualityProfile.load(path, r_max=8)


def test_a_missing_file_is_invalid(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="missing"):
        QualityProfile.load(tmp_path / QUALITY_FILE, r_max=8)


def test_json_is_plain(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "q.json")
    assert json.loads((tmp_path / "q.json").read_text())["metrics"][1] == {
        "name": "loss",
        "higher_is_better": False,
        "values": {"1": 1.5, "8": 0.9},
    }
