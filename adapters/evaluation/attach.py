"""An adapter on a base model at one rank after the other, as a server computes it."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter
from adapters.config import AdapterKind
from adapters.merge import check_fits, weight_update
from adapters.nesting import renest


class AttachedAdapter:
    """Merges an adapter into a model, a rank at a time, always from the untouched base.

    Merged weights are one of the ways in which a server runs an adapter, and the quickest to measure: the model runs as it
    came. Everything an adapter holds takes part: factors of linear layers, Conv1D and embeddings, modules of different
    ranks, LoRA's own biases, replaced biases and saved modules. A plain LoRA is re-nested first, as a server does at upload.

    A module gets parameters of its own, so that a weight tied to one that is merged (an output head to its embedding)
    stays the base's.

    Attributes:
        adapter: what is attached, re-nested if it was a plain LoRA.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        """Check that `adapter` fits; `model` stays the base until a rank is selected.

        Raises:
            InvalidAdapter: a module or parameter is missing in the model or of another shape; lists every offender.
        """
        self.adapter = renest(adapter) if adapter.config.kind is AdapterKind.LORA else adapter
        self._replaced = _replaced(self.adapter)
        check_fits(model, self.adapter, adds_biases=True)
        touched = sorted({*self.adapter.modules, *self.adapter.lora_bias, *self._replaced})
        self._modules = {path: model.get_submodule(path) for path in touched}
        self._originals = {path: dict(module._parameters) for path, module in self._modules.items()}

    @torch.no_grad()
    def select(self, rank: int | None) -> None:
        """Make the model compute what base and adapter do at `rank`; None: the base alone.

        Raises:
            IllegalRank: the adapter does not have this rank; nothing is changed then.
        """
        scale = 1.0 if rank is None else self.adapter.config.scale(rank)
        for path, own in self._originals.items():
            _set(self._modules[path], own)
        if rank is None:
            return
        for path, module in self._modules.items():
            _set(module, {name: nn.Parameter(value, requires_grad=False) for name, value in self._merged(path, rank, scale)})

    def _merged(self, path: str, rank: int, scale: float) -> Iterator[tuple[str, Tensor]]:
        """The parameters that a module gets at a rank, by name; summed in float32 and rounded once."""
        own = self._originals[path]
        new = {name: value.to(own[name]) for name, value in self._replaced.get(path, {}).items()}
        factors = self.adapter.modules.get(path)
        if factors is not None:
            weight = new.get("weight", own["weight"])
            assert weight is not None  # checked by check_fits
            update = weight_update(self._modules[path], factors, rank)
            new["weight"] = torch.add(weight.float(), update, alpha=scale).to(weight.dtype)
        if path in self.adapter.lora_bias:
            added = self.adapter.lora_bias[path].to(new["weight"])
            before = new.get("bias", own.get("bias"))
            new["bias"] = added if before is None else before + added
        yield from new.items()


def _set(module: nn.Module, parameters: Mapping[str, nn.Parameter | None]) -> None:
    for name, parameter in parameters.items():
        setattr(module, name, parameter)


def _replaced(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """Module path to the parameters, by their own names, that take the place of the base's."""
    replaced: dict[str, dict[str, Tensor]] = {}
    by_name = {f"{path}.bias": bias for path, bias in adapter.base_bias.items()} | dict(adapter.saved_modules)
    for name, value in by_name.items():
        path, _, leaf = name.rpartition(".")
        replaced.setdefault(path, {})[leaf] = value
    return replaced
