"""Merged weights, computed once per (adapter version, rank) and kept within a number of bytes."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.adapter import Adapter
from service.core import AdapterChoice, CacheStats
from service.engine.adapted import AdaptedModule, replaced_parameters, touched_modules
from service.engine.sites import Site


@dataclass(frozen=True)
class MergedWeights:
    """Module path to the parameters that run in the place of the base's own."""

    parameters: Mapping[str, Mapping[str, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters held."""
        return sum(tensor.nbytes for by_name in self.parameters.values() for tensor in by_name.values())

    def apply(self, module: AdaptedModule, x: Tensor) -> Tensor:
        """The module's output with merged weights: this is a whole step's way to run, see `adapted.lora_step`."""
        merged = self.parameters.get(module.site.path)
        if merged is None:
            return module.run_base(x)
        return module.site.run(x, merged)


def merge(adapter: Adapter, choice: AdapterChoice, site_of: Callable[[str], Site]) -> MergedWeights:
    """Merge an adapter at one rank: `W + scale * B[:, :rank] @ A[:rank]` for every module it changes.

    Always from the pristine base, never by adding to and subtracting from one copy, so that no rounding is left behind;
    computed in fp32 and rounded once.
    """
    merged: dict[str, Mapping[str, Tensor]] = {}
    replaced = replaced_parameters(adapter)
    for path in touched_modules(adapter):
        site = site_of(path)
        own = dict(site.module.named_parameters(recurse=False))
        parameters = {name: value.to(own[name]) for name, value in replaced.get(path, {}).items()}
        factors = adapter.modules.get(path)
        if factors is not None:
            a = factors.a[: choice.rank].to(site.weight.device, torch.float32)  # [rank, in]
            b = factors.b[:, : choice.rank].to(site.weight.device, torch.float32)  # [out, rank]
            base = parameters.get("weight", site.weight)
            weight = torch.addmm(site.delta(base.float()), b, a, alpha=choice.scale)  # [out, in]
            parameters["weight"] = site.delta(weight).to(site.weight.dtype).contiguous()
        lora_bias = adapter.lora_bias.get(path)
        if lora_bias is not None:
            before = parameters.get("bias", own.get("bias"))
            added = lora_bias.to(site.weight)
            parameters["bias"] = added if before is None else before + added
        merged[path] = parameters
    return MergedWeights(merged)


def merged_nbytes(adapter: Adapter, site_of: Callable[[str], Site]) -> int:
    """Bytes that `merge` would hold, at most: every touched module's parameters."""
    return sum(p.nbytes for path in touched_modules(adapter) for p in site_of(path).module.parameters(recurse=False))


class MergedCache:
    """Least recently used merged weights are dropped when `capacity_bytes` would be passed."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._entries: OrderedDict[AdapterChoice, MergedWeights] = OrderedDict()
        self._hits = self._misses = self._evictions = self._nbytes = 0

    @property
    def stats(self) -> CacheStats:
        """Counters since start."""
        return CacheStats(self._hits, self._misses, self._evictions, self._nbytes)

    def __contains__(self, choice: AdapterChoice) -> bool:
        return choice in self._entries

    def get(self, choice: AdapterChoice) -> MergedWeights | None:
        """The merged weights if they are held; counts a hit or a miss."""
        found = self._entries.get(choice)
        if found is None:
            self._misses += 1
            return None
        self._hits += 1
        self._entries.move_to_end(choice)
        return found

    def put(self, choice: AdapterChoice, weights: MergedWeights) -> None:
        """Keep merged weights, dropping the least recently used; what is larger than the whole cache is not kept."""
        self.discard(choice)
        if weights.nbytes > self._capacity:
            return
        while self._nbytes + weights.nbytes > self._capacity:
            _, dropped = self._entries.popitem(last=False)
            self._nbytes -= dropped.nbytes
            self._evictions += 1
        self._entries[choice] = weights
        self._nbytes += weights.nbytes

    def discard(self, choice: AdapterChoice) -> None:
        """Drop one entry, if held."""
        dropped = self._entries.pop(choice, None)
        if dropped is not None:
            self._nbytes -= dropped.nbytes

    def forget(self, version: str) -> None:
        """Drop every rank of an adapter that was unloaded."""
        for choice in [choice for choice in self._entries if choice.version == version]:
            self.discard(choice)
