"""`dylora export`: one rank of an adapter, for software that knows nothing of nested ones."""

from dataclasses import dataclass
from pathlib import Path

from adapters.commands.command import Command, option, typed
from adapters.commands.dtype import Dtype
from adapters.commands.folders import new_folder, read_adapter
from adapters.errors import AdapterError, IllegalRank

_DESCRIPTION = """\
Write one rank of an adapter for other software.

Without --merge: a stock PEFT checkpoint of that rank. r and lora_alpha are set so that any reader of PEFT's files computes
what this adapter computes at that rank.

With --merge: the whole model with the adapter added to its weights, as transformers' save_pretrained writes it
(safetensors, config, tokenizer). Merged in float32, which takes 4 bytes of memory per parameter, and checked against the
base with the adapter beside it. It runs as fast as the base, at this one rank.

examples:
  dylora export ./my-adapter --rank 4 --out ./rank4
  dylora export ./my-adapter --rank 4 --out ./model4 --merge --model ./my-base
  dylora export ./my-adapter --out ./model --merge --model org/name --dtype bfloat16

in Python:
  from adapters import export
  export("my-adapter", "rank4", rank=4)
"""


@dataclass(frozen=True)
class ExportOptions:
    """Options of `dylora export`."""

    adapter: Path = option("folder with the adapter", positional=True, metavar="ADAPTER")
    out: Path = option("folder to write, new or empty", metavar="FOLDER")
    rank: int | None = option("which of its ranks; the largest unless given", None)
    merge: bool = option("write the whole model with the adapter merged into it, which needs --model", False)
    model: str | None = option("with --merge: folder or hub name of the base model", None)
    dtype: Dtype = option("with --merge: of the written weights; auto: as the base has them", Dtype.AUTO)


def export(
    adapter: Path | str,
    out: Path | str,
    rank: int | None = None,
    merge: bool = False,
    model: Path | str | None = None,
    dtype: Dtype | str = Dtype.AUTO,
) -> int:
    """Write one rank of an adapter to a new folder: a stock PEFT checkpoint, or the whole model with it merged in.

    Args:
        adapter: folder of a PEFT checkpoint.
        out: folder to write, new or empty.
        rank: one of the adapter's ranks; the largest unless given.
        merge: write the merged model.
        model: with `merge`, folder or hub name of the base model.
        dtype: with `merge`, float32, bfloat16 or float16; auto, as the base's.

    Returns:
        the rank that was written.

    Raises:
        IllegalRank: the adapter does not have this rank.
        InvalidAdapter: the checkpoint can't be read, or does not fit the model.
        AdapterError: `merge` without `model` or the reverse, a plain LoRA at a lower rank, `out` is there already, or the model
            can't be used.
    """
    given = {"adapter": adapter, "out": out, "rank": rank, "merge": merge, "model": model, "dtype": dtype}
    return _exported(typed(ExportOptions, given))


def _exported(options: ExportOptions) -> int:
    if options.merge and options.model is None:
        raise AdapterError("merge needs model: the folder or hub name of the base model")
    for name, is_given in (("model", options.model is not None), ("dtype", options.dtype is not Dtype.AUTO)):
        if is_given and not options.merge:
            raise AdapterError(f"{name} is given without merge, and means nothing for a PEFT checkpoint")
    import torch

    from adapters.merged_model import export_merged
    from adapters.nesting import export_rank

    source = read_adapter(options.adapter)
    chosen = source.config.r_max if options.rank is None else options.rank
    try:
        source.config.check_rank(chosen)
    except IllegalRank as error:
        if len(error.legal) == 1 and 1 <= chosen < source.config.r_max:
            raise AdapterError(
                f"rank {chosen}: a plain LoRA has only its own, {source.config.r_max}, and its first columns are no adapter; "
                "`dylora convert` makes it nested"
            ) from error
        raise
    with new_folder(options.out) as folder:
        if options.model is None:
            export_rank(source, chosen, folder)
        else:
            dtype = None if options.dtype is Dtype.AUTO else getattr(torch, options.dtype)
            export_merged(source, chosen, options.model, folder, dtype)
    return chosen


def run(options: ExportOptions) -> int:
    """Export, and say in a line what was written."""
    rank = _exported(options)
    print(f"wrote {options.out}: {f'{options.model} with ' if options.merge else ''}{options.adapter} at rank {rank}")
    return 0


COMMAND = Command("export", "write one rank as a PEFT checkpoint, or merged into its model", _DESCRIPTION, ExportOptions, run)
