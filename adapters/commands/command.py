"""A command's options, stated once: as the fields of a frozen dataclass, of which argparse's options are made."""

import argparse
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from adapters.errors import AdapterError

Options = TypeVar("Options")


def option(
    help: str,
    default: Any = MISSING,
    *,
    positional: bool = False,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A field of an options dataclass.

    Args:
        help: one line for `--help`; the default is added to it.
        default: an option without one is required.
        positional: given by place, not by name.
        metavar: what stands for the value in `--help`.
        parse: reads the text, where the type is not one of str, int, float, bool, Path or a StrEnum; raises ValueError
            with a message that says what is legal.
    """
    metadata = {"help": help, "positional": positional, "metavar": metavar, "parse": parse}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Command(Generic[Options]):
    """One `dylora` command.

    Attributes:
        name: as typed.
        summary: one line for the list of commands.
        description: what it does, and examples, for its own `--help`.
        options: the dataclass.
        run: does it; what it returns is the exit status. AdapterError becomes an error line and exit status 2.
    """

    name: str
    summary: str
    description: str
    options: type[Options]
    run: Callable[[Options], int]

    def add_to(self, commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        """Add the command's parser; `options_of` reads what it parsed."""
        parser = commands.add_parser(
            self.name,
            help=self.summary,
            description=self.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        hints = get_type_hints(self.options)
        for entry in fields(self.options):  # type: ignore[arg-type]
            _add_option(parser, entry, hints[entry.name])

    def options_of(self, parsed: dict[str, Any]) -> Options:
        """The options as parsed. Raises AdapterError where they contradict each other."""
        return self.options(**{f.name: parsed[f.name] for f in fields(self.options)})  # type: ignore[arg-type]


def typed(options: type[Options], values: Mapping[str, Any], refusal: type[AdapterError] = AdapterError) -> Options:
    """The options as Python's callers give them: text is read as on the command line, and a list may stand for a tuple.

    Raises:
        refusal: a value that is not of its option's type; names the option.
        TypeError: an option that does not exist.
    """
    known, hints = {entry.name: entry for entry in fields(options)}, get_type_hints(options)  # type: ignore[arg-type]
    read = {n: _typed(known[n], hints[n], value, refusal) if n in known else value for n, value in values.items()}
    return options(**read)


def _typed(entry: "Field[Any]", hint: Any, value: Any, refusal: type[AdapterError]) -> Any:
    kind, parse = _without_none(hint), entry.metadata["parse"]
    if value is None and hint != kind:
        return None
    if kind is str and isinstance(value, Path):
        return str(value)
    if parse is not None and not isinstance(value, str):
        if isinstance(value, list | range | tuple):
            return tuple(value)
    elif (kind is bool or not isinstance(value, str)) and kind in _WORDS:
        if isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) is (kind is bool):
            return value
    else:
        reader = parse or kind
        try:
            return reader(value)
        except (TypeError, ValueError) as error:
            raise refusal(f"{entry.name}: {_complaint(reader, value, error)}") from error
    raise refusal(f"{entry.name}: {value!r} is not {_WORDS.get(kind, 'a sequence')}")


def parse_ranks(text: str) -> tuple[int, ...]:
    """Read "1-16", "1,2,4,8,16", or both: "1-4,8"."""
    ranks: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        bounds = (first, last) if "-" in part else (first, first)
        if not all(bound.strip().isdecimal() for bound in bounds) or int(bounds[0]) > int(bounds[1]):
            raise ValueError(f"{text!r} is neither a range of ranks like 1-16 nor a list like 1,2,4,8,16")
        ranks += range(int(bounds[0]), int(bounds[1]) + 1)
    return tuple(ranks)


def _add_option(parser: argparse.ArgumentParser, entry: "Field[Any]", hint: Any) -> None:
    kind = _without_none(hint)
    meta = entry.metadata
    text = meta["help"] + ("" if entry.default in (MISSING, None, (), False) else f" (default: {entry.default})")
    text = text.replace("%", "%%")
    if kind is bool:
        flag = "--" + entry.name.replace("_", "-")
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=entry.default, help=text)
        return
    shared: dict[str, Any] = {"help": text, "metavar": meta["metavar"], "type": _reader(meta["parse"] or kind)}
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        shared["metavar"] = "{" + ",".join(kind) + "}"
    if meta["positional"]:
        parser.add_argument(entry.name, **shared)
        return
    flag = "--" + entry.name.replace("_", "-")
    is_required = entry.default is MISSING
    parser.add_argument(flag, required=is_required, default=None if is_required else entry.default, **shared)


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read`, whose ValueError argparse will show as it stands: it names the option, the message says what is legal."""

    def reader(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(_complaint(read, text, error)) from error

    return reader


_WORDS: Mapping[Any, str] = {int: "a whole number", float: "a number", bool: "True or False"}


def _complaint(read: Callable[[str], Any], text: str, error: Exception) -> str:
    if isinstance(read, type) and issubclass(read, StrEnum):
        return f"{text!r} is not one of {', '.join(read)}"
    return f"{text!r} is not {_WORDS[read]}" if read in _WORDS else str(error)
