"""How a step runs: the base alone, one pair's merged weights, or every adapter and rank mixed."""

from collections.abc import Callable

from adapters.adapter import Adapter
from service.core import AdapterChoice, CacheStats, EngineObserver, Mode
from service.engine.adapted import LoraStep
from service.engine.lora import LoraBank
from service.engine.merge_worker import MergeResult, MergeWorker
from service.engine.merged import MergedCache, MergedWeights, merged_nbytes
from service.engine.runner import Rows
from service.engine.scheduler import Batch
from service.engine.step_costs import StepCosts


class Planner:
    """Chooses the mode of each step, and owns the merged weights.

    A step of one (adapter, rank) runs merged if those weights are held. After `merge_after_steps` such steps in a row they
    are made in the background, one pair at a time, if they fit the cache at all; until then, and for good if that fails, the
    steps run mixed. Where mixed steps of as many rows turn out to be cheaper, they go on. What has no merged weights is never
    split off a mixed step: the kernels add 3 to 6% to the base's product, a second pass over the weights more than that.

    Merged weights round otherwise than mixed steps do, and what runs beside a request decides whether its steps can run
    merged: so beside one whose text must be the same again, steps run mixed.
    """

    def __init__(
        self,
        bank: LoraBank,
        *,
        cache_bytes: int,
        merge_after_steps: int,
        observer: EngineObserver | None,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        """`post` has a call made from the engine's thread, between two steps, by whichever thread it is called."""
        self._bank = bank
        self._cache_bytes = cache_bytes
        self._nbytes: dict[str, int] = {}  # version -> bytes of its merged weights; asked in every step
        self._merged = MergedCache(cache_bytes)
        self._merge_after_steps = merge_after_steps
        self._observer = observer
        self._costs = StepCosts()
        self._worker = MergeWorker(bank.site, lambda result: post(lambda: self._take(result)))
        self._merging: AdapterChoice | None = None
        self._is_merge_wanted = True
        self._unmergeable: set[AdapterChoice] = set()
        self._last: AdapterChoice | None = None
        self._streak = 0

    @property
    def stats(self) -> CacheStats:
        """The merged cache's counters."""
        return self._merged.stats

    @property
    def merged_choices(self) -> frozenset[AdapterChoice]:
        """The pairs whose merged weights are held."""
        return self._merged.choices

    def stop(self) -> None:
        """End the merge that runs, if any."""
        self._worker.stop()

    def forget(self, version: str) -> None:
        """Drop the merged weights of an adapter at every rank."""
        self._merged.forget(version)
        self._nbytes.pop(version, None)
        self._unmergeable = {choice for choice in self._unmergeable if choice.version != version}
        if self._merging is not None and self._merging.version == version:
            self._is_merge_wanted = False

    def plan(self, batch: Batch, adapter: Adapter | None, rows: Rows) -> tuple[Mode, LoraStep | None]:
        """How to run a batch whose first row uses `adapter`."""
        pairs = batch.pairs
        if pairs == {None}:
            return Mode.BASE, None
        choice = next(iter(pairs)) if len(pairs) == 1 else None
        self._streak = self._streak + 1 if choice == self._last else 1
        self._last = choice
        if choice is not None and adapter is not None and not any(chunk.sequence.is_repeatable for chunk in batch.chunks):
            weights = self._merged_weights(choice, adapter)
            rows_used = rows.input_ids.numel()
            if weights is not None and self._costs.cheapest((Mode.MERGED, Mode.MIXED), rows_used) is Mode.MERGED:
                return Mode.MERGED, weights
        choices = [chunk.sequence.choice for chunk in batch.chunks]
        return Mode.MIXED, self._bank.step(choices, [chunk.length for chunk in batch.chunks], rows.kept)

    def record(self, mode: Mode, rows: int, seconds: float) -> None:
        """A step that was planned has run."""
        self._costs.record(mode, rows, seconds)

    def _merged_weights(self, choice: AdapterChoice, adapter: Adapter) -> MergedWeights | None:
        """Those that are held; if they are not and it is worth it, they are begun."""
        weights = self._merged.get(choice)
        is_idle = self._merging is None and self._streak > self._merge_after_steps
        if weights is None and is_idle and self._can_merge(choice, adapter):
            self._merging = choice
            self._worker.start(adapter, choice, self._merged.make_room(self._nbytes[choice.version]))
        return weights

    def _can_merge(self, choice: AdapterChoice, adapter: Adapter) -> bool:
        if choice.version not in self._nbytes:
            self._nbytes[choice.version] = merged_nbytes(adapter, self._bank.site)
        return self._nbytes[choice.version] <= self._cache_bytes and choice not in self._unmergeable

    def _take(self, result: MergeResult) -> None:
        """A merge ended: from now on its pair's steps can run merged."""
        if result.weights is None and self._is_merge_wanted:
            self._unmergeable.add(result.choice)
        elif result.weights is not None and self._is_merge_wanted:
            self._merged.put(result.choice, result.weights)
        self._merging, self._is_merge_wanted = None, True
        if result.weights is not None and self._observer is not None:
            self._observer.on_merge(result.seconds)
