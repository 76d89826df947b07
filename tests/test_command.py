import argparse
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest

from adapters.commands.command import Command, option, typed
from adapters.errors import AdapterError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


def pair(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text!r} is not a list of whole numbers like 1,2") from error


@dataclass(frozen=True)
class Paint:
    wall: Path = option("what to paint", positional=True)
    coats: int = option("how many")
    colour: Colour = option("which one, 100% opaque", Colour.RED)
    share: float | None = option("of the wall", None)
    spots: tuple[int, ...] = option("where", (), parse=pair)
    dry: bool = option("wait until it is dry", False)


COMMAND = Command("paint", "paint a wall", "Paint a wall.\n\nexample:\n  paint w --coats 2", Paint, lambda paint: 0)


def parsed(*argv: str) -> Paint:
    parser = argparse.ArgumentParser()
    COMMAND.add_to(parser.add_subparsers())
    return COMMAND.options_of(vars(parser.parse_args(["paint", *argv])))


def test_options_come_out_with_their_types_and_defaults() -> None:
    assert parsed("w", "--coats", "2") == Paint(Path("w"), 2, Colour.RED)
    everything = parsed("w", "--coats=3", "--colour", "blue", "--share", "0.5", "--spots", "1,2", "--dry")
    assert everything == Paint(Path("w"), 3, Colour.BLUE, 0.5, (1, 2), True)
    assert everything.colour is Colour.BLUE


def test_python_gives_texts_or_values() -> None:
    everything = Paint(Path("w"), 3, Colour.BLUE, 0.5, (1, 2), True)
    texts = {"wall": "w", "coats": "3", "colour": "blue", "share": "0.5", "spots": "1,2", "dry": True}
    assert typed(Paint, texts) == typed(Paint, {**texts, "coats": 3, "share": 0.5, "spots": [1, 2]}) == everything
    assert typed(Paint, {"wall": Path("w"), "coats": 2, "share": None}) == Paint(Path("w"), 2)
    refused = {
        "coats": ("two", 2.5, True, None),
        "colour": ("green", 3),
        "share": ("x", [1]),
        "spots": ("x", 4),
        "dry": ("yes",),
    }
    for name, values in refused.items():
        for value in values:
            with pytest.raises(AdapterError, match=f"^{name}: "):
                typed(Paint, texts | {name: value})
    with pytest.raises(TypeError, match="shade"):
        typed(Paint, texts | {"shade": 1})


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("w",), "required: --coats"),
        (("w", "--coats", "two"), "argument --coats: 'two' is not a whole number"),
        (("w", "--coats", "2", "--colour", "green"), "argument --colour: 'green' is not one of red, blue"),
        (("w", "--coats", "2", "--spots", "x"), "argument --spots: 'x' is not a list of whole numbers"),
        (("w", "--coats", "2", "--shade", "1"), "unrecognized arguments: --shade"),
    ],
)
def test_bad_usage_is_named(argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed(*argv)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_help_shows_defaults_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    assert "{red,blue}" in text and "100% opaque (default: red)" in text and "--dry, --no-dry" in text
