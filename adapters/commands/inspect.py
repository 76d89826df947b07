"""`dylora inspect`: what is in an adapter, and how much of its update each rank keeps."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.commands.command import Command, option
from adapters.commands.folders import read_adapter
from adapters.errors import AdapterError

if TYPE_CHECKING:
    from adapters.inspection import Inspection

_DESCRIPTION = """\
Show what is in an adapter's folder: its kind, ranks, scale and targets; at every rank its size, the energy that it keeps,
and its measured quality if quality.json is there.

Energy is the share of the update's squared norm that the first b columns hold, 1 at full rank. It says how fast an
adapter's ranks fill up, and which modules could do with fewer; it is not quality, which only `dylora evaluate` measures. A
plain LoRA is shown twice: as its columns lie, where the first ones are no better than others, and in SVD order, which is
what `dylora convert` makes of it.

examples:
  dylora inspect ./my-adapter
  dylora inspect ./my-adapter --every-module --plot energy.svg
  dylora inspect ./my-adapter --json | jq '.at_rank[].energy'

in Python:
  from adapters import inspect
  print(inspect("my-adapter").ranks[0].energy)
"""


@dataclass(frozen=True)
class InspectOptions:
    """Options of `dylora inspect`."""

    adapter: Path = option("folder with the adapter", positional=True, metavar="ADAPTER")
    plot: Path | None = option("also draw energy against rank to this file, .png or .svg", None, metavar="FILE")
    every_module: bool = option("a line for each module, not one for all modules of a name", False)
    json: bool = option("print JSON, with every module and every rank", False)


def inspect(adapter: Path | str, plot: Path | str | None = None) -> "Inspection":
    """What is in an adapter's folder.

    Args:
        adapter: folder of a PEFT checkpoint.
        plot: file to draw energy against rank to, .png or .svg.

    Raises:
        InvalidAdapter: the checkpoint can't be read.
        AdapterError: there is no such folder, or `plot` can't be drawn.
    """
    from adapters.inspection import inspect_adapter

    found = inspect_adapter(read_adapter(adapter))
    if plot is not None:
        _draw(found, Path(plot), title=Path(adapter).resolve().name)
    return found


def _draw(found: "Inspection", path: Path, title: str) -> None:
    try:
        from adapters.commands.inspect_plot import energy_figure
        from adapters.plots.line_plot import save_figure
    except ModuleNotFoundError as error:
        raise AdapterError(f"plot: {error.name} is not installed; pip install 'dylora-serve[train]' brings it") from error
    save_figure(energy_figure(found, title), path)


def run(options: InspectOptions) -> int:
    """Inspect and print."""
    found = inspect(options.adapter, options.plot)
    if options.plot is not None:
        print(f"wrote {options.plot}", file=sys.stderr)  # standard output is the table's, or the JSON's
    if options.json:
        print(json.dumps(found.to_json(), indent=2))
        return 0
    from adapters.commands.inspect_table import table

    print(f"{options.adapter}\n{table(found, every_module=options.every_module)}")
    return 0


COMMAND = Command("inspect", "show ranks, sizes, and the energy kept at each rank", _DESCRIPTION, InspectOptions, run)
