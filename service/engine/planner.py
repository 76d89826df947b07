"""How a step runs: the base alone, one pair's merged weights, or every adapter and rank mixed."""

import time

import torch

from adapters.adapter import Adapter
from service.core import AdapterChoice, CacheStats, EngineObserver, Mode
from service.engine.adapted import LoraStep
from service.engine.lora import LoraBank
from service.engine.merged import MergedCache, MergedWeights, merge, merged_nbytes
from service.engine.runner import Rows
from service.engine.scheduler import Batch


class Planner:
    """Chooses the mode of each step, and owns the merged weights.

    A step of one (adapter, rank) runs merged if those weights are held, or after `merge_after_steps` such steps in a row,
    if they fit the cache at all.
    """

    def __init__(self, bank: LoraBank, *, cache_bytes: int, merge_after_steps: int, observer: EngineObserver | None) -> None:
        self._bank = bank
        self._cache_bytes = cache_bytes
        self._fits: dict[str, bool] = {}  # version -> whether its merged weights fit the cache; asked in every step
        self._merged = MergedCache(cache_bytes)
        self._merge_after_steps = merge_after_steps
        self._observer = observer
        self._last: AdapterChoice | None = None
        self._streak = 0

    @property
    def stats(self) -> CacheStats:
        """The merged cache's counters."""
        return self._merged.stats

    def forget(self, version: str) -> None:
        """Drop the merged weights of an adapter at every rank."""
        self._merged.forget(version)
        self._fits.pop(version, None)

    def plan(self, batch: Batch, adapter: Adapter | None, rows: Rows) -> tuple[Mode, LoraStep | None]:
        """How to run a batch whose first row uses `adapter`."""
        pairs = batch.pairs
        if pairs == {None}:
            return Mode.BASE, None
        choice = next(iter(pairs)) if len(pairs) == 1 else None
        self._streak = self._streak + 1 if choice == self._last else 1
        self._last = choice
        if choice is not None and adapter is not None:
            weights = self._merged_weights(choice, adapter)
            if weights is not None:
                return Mode.MERGED, weights
        choices = [chunk.sequence.adapter for chunk in batch.chunks]
        return Mode.MIXED, self._bank.step(choices, [chunk.length for chunk in batch.chunks], rows.sampled)

    def _merged_weights(self, choice: AdapterChoice, adapter: Adapter) -> MergedWeights | None:
        """Held, or made now if that is worth it."""
        is_worth_it = self._streak > self._merge_after_steps and self._can_hold(choice.version, adapter)
        if choice not in self._merged and not is_worth_it:
            return None
        return self._merged.get(choice) or self._merge(choice, adapter)

    def _can_hold(self, version: str, adapter: Adapter) -> bool:
        if version not in self._fits:
            self._fits[version] = merged_nbytes(adapter, self._bank.site) <= self._cache_bytes
        return self._fits[version]

    def _merge(self, choice: AdapterChoice, adapter: Adapter) -> MergedWeights:
        started = time.monotonic()
        with torch.inference_mode():
            weights = merge(adapter, choice, self._bank.site)
        self._merged.put(choice, weights)
        if self._observer is not None:
            self._observer.on_merge(time.monotonic() - started)
        return weights
