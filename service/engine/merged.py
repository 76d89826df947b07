"""Merged weights, computed once per (adapter version, rank) and kept within a number of bytes."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.adapter import Adapter
from service.core import AdapterChoice, CacheStats
from service.engine.adapted import AdaptedModule, has_special_rows, replaced_parameters, touched_modules
from service.engine.native.kernels import PANEL, Kernels, Products, Term
from service.engine.sites import Site

_ALIGNMENT_BYTES = 64
_SLICE_BYTES = 1 << 20
"""Of a weight merged at a time: it stays in the processor's cache between the copy and the product, and no call is so long
that a step has to wait for the core."""


class MergeCancelled(Exception):
    """A merge was given up because nobody waits for it any more."""


@dataclass(frozen=True, eq=False)
class MergedWeights:
    """Module path to the parameters that run in the place of the base's own.

    Attributes:
        is_plain: whether those are weights of linear layers and embeddings alone.
        buffer: the memory that holds the merged matrices, one after the other; bytes.
    """

    parameters: Mapping[str, Mapping[str, Tensor]]
    buffer: Tensor
    is_plain: bool
    _products: dict[str, Products] = field(default_factory=dict, init=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters held."""
        return sum(tensor.nbytes for by_name in self.parameters.values() for tensor in by_name.values())

    def apply(self, module: AdaptedModule, x: Tensor) -> Tensor:
        """The module's output with merged weights: this is a whole step's way to run, see `adapted.lora_step`."""
        path, site = module.site.path, module.site
        merged = self.parameters.get(path)
        if merged is None:
            return module.run_base(x)
        if site.kernels is None:
            return site.run(x, merged)
        if path not in self._products:
            weight, bias = site.own
            self._products[path] = site.kernels.products([Term(merged.get("weight", weight), merged.get("bias", bias))])
        return self._products[path](x)[0]


@torch.no_grad()
def merge(
    adapter: Adapter,
    choice: AdapterChoice,
    site_of: Callable[[str], Site],
    *,
    buffer: Tensor | None = None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> MergedWeights:
    """Merge an adapter at one rank: `W + scale * B[:, :rank] @ A[:rank]` for every module it changes.

    Always from the pristine base, never by adding to and subtracting from one copy, so that no rounding is left behind;
    computed in fp32 and rounded once.

    Args:
        buffer: memory to write to if it has the size needed; fresh memory costs as much in page faults as the merge.
        is_cancelled: asked before each module.

    Raises:
        MergeCancelled: `is_cancelled` said so.
    """
    merged: dict[str, Mapping[str, Tensor]] = {}
    replaced = replaced_parameters(adapter)
    sites = {path: site_of(path) for path in sorted(adapter.modules)}
    buffer = _fitting(buffer, sites)
    places = _places(buffer, sites)
    for path in touched_modules(adapter):
        if is_cancelled():
            raise MergeCancelled
        site = site_of(path)
        own = dict(site.module.named_parameters(recurse=False))
        parameters = {name: site.prepared(name, value.to(own[name])) for name, value in replaced.get(path, {}).items()}
        factors = adapter.modules.get(path)
        if factors is not None:
            a = factors.a[: choice.rank].to(site.weight.device, torch.float32)  # [rank, in]
            b = factors.b[:, : choice.rank].to(site.weight.device, torch.float32)  # [out, rank]
            base = parameters.get("weight", site.weight)
            if site.kernels is not None:
                parameters["weight"] = _merge_packed(site.kernels, base, a, b, choice.scale, out=places[path])
            else:
                left, right = (b, a) if site.delta(b) is b else (a.T, b.T)
                parameters["weight"] = _add_product(base, left, right, choice.scale, out=places[path])
        lora_bias = adapter.lora_bias.get(path)
        if lora_bias is not None:
            before = parameters.get("bias", own.get("bias"))
            added = lora_bias.to(site.weight)
            parameters["bias"] = added if before is None else before + added
        merged[path] = parameters
    return MergedWeights(merged, buffer, is_plain=not has_special_rows(adapter))


def merged_nbytes(adapter: Adapter, site_of: Callable[[str], Site]) -> int:
    """Bytes that `merge` would hold, at most: every touched module's parameters."""
    sizes = (p.nbytes for path in touched_modules(adapter) for p in site_of(path).module.parameters(recurse=False))
    return sum(map(_aligned, sizes))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _fitting(buffer: Tensor | None, sites: Mapping[str, Site]) -> Tensor:
    """`buffer` if it has just the size of the sites' weights, else a new one."""
    nbytes = sum(_aligned(site.weight.nbytes) for site in sites.values())
    if buffer is not None and buffer.numel() == nbytes:
        return buffer
    first = next(iter(sites.values()), None)
    fresh = torch.empty(nbytes, dtype=torch.uint8, device=None if first is None else first.weight.device)
    kernels = next((site.kernels for site in sites.values() if site.kernels is not None), None)
    return fresh if kernels is None else kernels.in_large_pages(fresh)


def _places(buffer: Tensor, sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """For each site a part of the buffer, with the shape and dtype of its weight."""
    places, start = {}, 0
    for path, site in sites.items():
        weight = site.weight
        places[path] = buffer[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
        start += _aligned(weight.nbytes)
    return places


def _add_product(weight: Tensor, left: Tensor, right: Tensor, scale: float, *, out: Tensor) -> Tensor:
    """`weight + scale * left @ right` in fp32, rounded to `out`; shapes [n, m], [n, rank], [rank, m]."""
    rows = len(weight) if weight.is_cuda else max(1, _SLICE_BYTES // (weight.shape[1] * torch.float32.itemsize))
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        if weight.dtype is torch.float32:
            torch.addmm(weight[part], left[part], right, alpha=scale, out=out[part])
        else:
            out[part] = torch.addmm(weight[part].float(), left[part], right, alpha=scale)
    return out


def _merge_packed(kernels: Kernels, weight: Tensor, a: Tensor, b: Tensor, scale: float, *, out: Tensor) -> Tensor:
    """The same for a packed weight."""
    panels = max(1, _SLICE_BYTES // (PANEL * weight.shape[1] * weight.itemsize))
    for start in range(0, len(weight) // PANEL, panels):
        kernels.merge(weight, a, b, scale, out, range(start, min(start + panels, len(weight) // PANEL)))
    return out


class MergedCache:
    """Least recently used merged weights are dropped before `capacity_bytes` would be passed, those being made included.

    Only the engine's thread uses it, between steps: what a step runs with is never dropped under it.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[AdapterChoice, MergedWeights] = OrderedDict()
        self._hits = self._misses = self._evictions = self._nbytes = 0
        self.choices: frozenset[AdapterChoice] = frozenset()
        """The pairs that are held."""

    @property
    def stats(self) -> CacheStats:
        """Counters since start."""
        return CacheStats(self._hits, self._misses, self._evictions, self._nbytes)

    def get(self, choice: AdapterChoice) -> MergedWeights | None:
        """The merged weights if they are held, which counts as a hit."""
        found = self._entries.get(choice)
        if found is not None:
            self._hits += 1
            self._entries.move_to_end(choice)
        return found

    def make_room(self, nbytes: int) -> Tensor | None:
        """Drop the least recently used until `nbytes` more fit, for a pair that was not held (a miss).

        Returns:
            The memory of one that was dropped, to write the new weights to; None if nothing was.
        """
        self._misses += 1
        buffer = None
        while self._entries and self._nbytes + nbytes > self._capacity_bytes:
            buffer = self._drop(next(iter(self._entries))).buffer
            self._evictions += 1
        return buffer

    def put(self, choice: AdapterChoice, weights: MergedWeights) -> None:
        """Keep merged weights for which room was made."""
        self._entries[choice] = weights
        self._nbytes += weights.nbytes
        self.choices = frozenset(self._entries)

    def forget(self, version: str) -> None:
        """Drop every rank of an adapter that was unloaded."""
        for choice in [choice for choice in self._entries if choice.version == version]:
            self._drop(choice)

    def _drop(self, choice: AdapterChoice) -> MergedWeights:
        dropped = self._entries.pop(choice)
        self._nbytes -= dropped.nbytes
        self.choices = frozenset(self._entries)
        return dropped
