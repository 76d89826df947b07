"""Nested low-rank adapters: train once, use at every rank up to r_max.

The commands of `dylora` as functions (`train`, `evaluate`, `inspect`, `convert`, `export`) and the nouns that they speak of.
A name's module is imported when the name is first used, so that `import adapters` waits for nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapters.adapter import Adapter, LowRank
    from adapters.checkpoint import describe_peft, read_peft, write_peft
    from adapters.commands.convert import convert
    from adapters.commands.evaluate import evaluate
    from adapters.commands.export import export
    from adapters.commands.inspect import inspect
    from adapters.commands.train import train
    from adapters.config import AdapterConfig, AdapterKind
    from adapters.errors import AdapterError, DataError, IllegalRank, InvalidAdapter, TrainingError
    from adapters.inspection import Inspection
    from adapters.nesting import at_rank, energy_per_rank, export_rank, first_columns, renest
    from adapters.quality import Metric, QualityProfile
    from adapters.training.dylora import DyLoRAConfig

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "AdapterKind",
    "DataError",
    "DyLoRAConfig",
    "IllegalRank",
    "Inspection",
    "InvalidAdapter",
    "LowRank",
    "Metric",
    "QualityProfile",
    "TrainingError",
    "at_rank",
    "convert",
    "describe_peft",
    "energy_per_rank",
    "evaluate",
    "export",
    "export_rank",
    "first_columns",
    "inspect",
    "read_peft",
    "renest",
    "train",
    "write_peft",
]

_HOMES = {
    "adapters.adapter": ("Adapter", "LowRank"),
    "adapters.checkpoint": ("describe_peft", "read_peft", "write_peft"),
    "adapters.commands.convert": ("convert",),
    "adapters.commands.evaluate": ("evaluate",),
    "adapters.commands.export": ("export",),
    "adapters.commands.inspect": ("inspect",),
    "adapters.commands.train": ("train",),
    "adapters.config": ("AdapterConfig", "AdapterKind"),
    "adapters.errors": ("AdapterError", "DataError", "IllegalRank", "InvalidAdapter", "TrainingError"),
    "adapters.inspection": ("Inspection",),
    "adapters.nesting": ("at_rank", "energy_per_rank", "export_rank", "first_columns", "renest"),
    "adapters.quality": ("Metric", "QualityProfile"),
    "adapters.training.dylora": ("DyLoRAConfig",),
}

# Type checkers see the imports above: to them this function would make every misspelt name a legal one.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """What Python asks for a name that is not imported yet (PEP 562)."""
        home = next((module for module, names in _HOMES.items() if name in names), None)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = getattr(import_module(home), name)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
