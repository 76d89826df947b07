"""`dylora convert`: a plain LoRA made nested, a nested adapter made smaller."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.commands.command import Command, option, typed
from adapters.commands.folders import new_folder, read_adapter
from adapters.config import AdapterKind
from adapters.errors import AdapterError

if TYPE_CHECKING:
    from adapters.adapter import Adapter

_DESCRIPTION = """\
Change an adapter's columns without training.

A plain LoRA becomes nested: it is rotated into SVD order, so that its first b columns are the best adapter of rank b
that its update has, for every b. At full rank it computes what it computed before. The server does the same to a plain
LoRA that is uploaded; do it here to look at the result, to measure it, or to make it smaller.

With --r-max a nested adapter is cut to its first columns. The ranks that are left compute what they computed before;
quality.json keeps those ranks. For one rank as an ordinary PEFT checkpoint see `dylora export`.

examples:
  dylora convert ./my-lora --out ./my-nested              every rank from 1 to the LoRA's own
  dylora convert ./my-lora --out ./small --r-max 4        ranks 1 to 4
  dylora convert ./my-dylora --out ./small --r-max 4      a DyLoRA without its later columns

in Python:
  from adapters import convert
  adapter = convert("my-lora", "my-nested")
"""


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `dylora convert`."""

    adapter: Path = option("folder with the adapter", positional=True, metavar="ADAPTER")
    out: Path = option("folder to write, new or empty", metavar="FOLDER")
    r_max: int | None = option("keep ranks up to this one; all of them unless given", None, metavar="RANK")


def convert(adapter: Path | str, out: Path | str, r_max: int | None = None) -> "Adapter":
    """Make a plain LoRA nested, or cut a nested adapter to its first `r_max` columns, and write it to a new folder.

    Args:
        adapter: folder of a PEFT checkpoint.
        out: folder to write, new or empty.
        r_max: the largest rank to keep; all unless given.

    Returns:
        what was written.

    Raises:
        IllegalRank: `r_max` is no rank of the nested adapter.
        InvalidAdapter: the checkpoint can't be read.
        AdapterError: there is nothing to change, or `out` is there already.
    """
    return _converted(typed(ConvertOptions, {"adapter": adapter, "out": out, "r_max": r_max}))


def _converted(options: ConvertOptions) -> "Adapter":
    from adapters.checkpoint import write_peft
    from adapters.nesting import first_columns, renest

    before = read_adapter(options.adapter)
    with new_folder(options.out) as folder:
        if before.config.kind is AdapterKind.LORA:
            after = renest(before)
        elif options.r_max is None or options.r_max == before.config.r_max:
            raise AdapterError(
                f"{options.adapter} is nested already ({before.config.kind}, ranks {before.config.ranks_text}); "
                "give a smaller r_max to cut it, or export one rank"
            )
        else:
            after = before
        if options.r_max is not None:
            after = first_columns(after, options.r_max)
        write_peft(after, folder)
    return after


def run(options: ConvertOptions) -> int:
    """Convert, and say in a line what came out."""
    after = _converted(options)
    print(f"wrote {options.out}: {after.config.kind}, ranks {after.config.ranks_text}, {len(after.modules)} modules")
    return 0


COMMAND = Command("convert", "make a plain LoRA nested, or a nested adapter smaller", _DESCRIPTION, ConvertOptions, run)
