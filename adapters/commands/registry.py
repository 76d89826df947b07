"""The library's commands in the order in which `dylora --help` lists them.

Nothing here or in what it imports may import torch: help and usage errors come at once.
"""

from typing import Any

from adapters.commands import convert, evaluate, export, inspect, train
from adapters.commands.command import Command

COMMANDS: tuple[Command[Any], ...] = (
    train.COMMAND,
    evaluate.COMMAND,
    inspect.COMMAND,
    convert.COMMAND,
    export.COMMAND,
)
