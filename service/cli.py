"""The `dylora` command: the server's own commands, whose options are the fields of Settings, and the library's."""

import argparse
import difflib
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from pydantic.fields import FieldInfo

from adapters.commands.registry import COMMANDS
from adapters.errors import AdapterError
from service import keys_command
from service.core import EngineObserver, EngineProtocol
from service.errors import ModelRefused
from service.settings import Settings, SettingsError, variable
from service.version import VERSION

BAD_USAGE = 2
"""Exit status for settings, models and folders that can't be used."""

_COMMANDS = (*COMMANDS, keys_command.COMMAND)
_SETTINGS = {"serve": "start the server", "settings": "print every setting, its variable and its value"}
"""Commands whose options are the settings."""

EngineFactory = Callable[[Settings, EngineObserver], EngineProtocol]

_EXAMPLES = """\
examples:
  dylora serve                                    the demo model and its adapters on http://127.0.0.1:8000
  dylora serve --model ./my-model --port 9000     a local folder with a causal language model
  dylora serve --model org/name --dtype bfloat16  a model of the Hugging Face hub
  DYLORA_PORT=9000 dylora serve                   every option is an environment variable too

then:
  curl localhost:8000/adapters
  curl localhost:8000/generate -H 'Content-Type: application/json' \\
       -d '{"inputs": "...", "parameters": {"adapter_id": "NAME", "rank": 4}}'
  curl -X PUT localhost:8000/adapters/NAME \\
       -F 'config=@adapter_config.json' -F 'model=@adapter_model.safetensors'
"""


def main(argv: Sequence[str] | None = None, make_engine: EngineFactory | None = None) -> int:
    """Run the command; its exit status.

    Args:
        argv: arguments without the program's name.
        make_engine: makes the engine; the real one unless given.
    """
    parser = _parser()
    found, unknown = parser.parse_known_args(argv)
    options = vars(found)
    command = options.pop("command")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_nearest(unknown[0]) if command in _SETTINGS else ''}")
    try:
        for each in _COMMANDS:
            if each.name == command:
                return each.run(each.options_of(options))
        settings = Settings.load(options)
        if command == "settings":
            print(_settings_table(settings))
            return 0
        if threading.current_thread() is threading.main_thread():  # no other thread may set a handler
            # Until the server sets its own. Without one, a container's first process would not even get the signal.
            signal.signal(signal.SIGTERM, _end)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is nothing to read again until the keys are read
        # Late, because it imports torch: help, settings and their errors should come at once.
        from service import launch

        return launch.serve(settings, make_engine or launch.real_engine)
    except (SettingsError, ModelRefused, AdapterError) as error:
        for line in str(error).splitlines():
            print(f"dylora: error: {line}", file=sys.stderr)
        return BAD_USAGE


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dylora",
        description="LLM inference where the LoRA rank is a run-time choice.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dylora {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in _SETTINGS.items():
        command = commands.add_parser(
            name, help=text, description=text, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for field, info in Settings.model_fields.items():
            _add_option(command, field, info)
    for each in _COMMANDS:
        each.add_to(commands)
    return parser


def _nearest(unknown: str) -> str:
    options = [_option(field) for field in Settings.model_fields]
    near = difflib.get_close_matches(unknown.partition("=")[0], options, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _add_option(parser: argparse.ArgumentParser, field: str, info: FieldInfo) -> None:
    default = info.get_default(call_default_factory=True, validated_data={})
    shown = "" if default in (None, {}) else f" (default {_plain(default)})"
    help_text = f"{info.description}{shown} [{variable(field)}]".replace("%", "%%")
    kind: Any = {"action": argparse.BooleanOptionalAction} if info.annotation is bool else {"metavar": "VALUE"}
    # Values stay text, and absent ones stay absent: Settings alone reads and checks them.
    parser.add_argument(_option(field), dest=field, default=argparse.SUPPRESS, help=help_text, **kind)


def _settings_table(settings: Settings) -> str:
    rows = [
        (variable(name), _plain(getattr(settings, name)), info.description or "")
        for name, info in Settings.model_fields.items()
    ]
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:<{wide[0]}}  {value:<{wide[1]}}  {text}" for name, value, text in rows)


def _plain(value: object) -> str:
    return "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
