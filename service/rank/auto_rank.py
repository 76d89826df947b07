"""The rank of every request that leaves it open, before and while it runs: one price of a column for all.

After each step the lowest price is looked for at which all requests in flight are predicted to be on time. It rises at once
and falls slowly. Requests whose policy is elastic move along their ladders with it; one that keeps its rank is chosen by the
highest price of the last minute, so that a calm moment does not take what the next burst needs.
"""

import math
import time
from collections.abc import Callable, Set
from dataclasses import dataclass, field

from service.core import AdapterChoice, Mode, StepReport
from service.rank.ladder import LEVELS, TOP
from service.rank.latency_model import LatencyModel
from service.rank.latency_policy import Prediction, lowest_price
from service.rank.load import LoadBook
from service.rank.prospect import Ask, EngineSizes, NotReady, Outlook, Prospect
from service.rank.safety import SafetyFactor
from service.settings import Settings

FALL_S = 0.05
"""The price falls by one level in this time."""
HOLD_S = 60.0
"""For a request that keeps its rank the price falls from the highest to none in this time."""


SPARED_S = 5.0
"""How long a slow step is felt: by those who run, and by those who come and find them still there."""


@dataclass
class Price:
    """Levels of `ladder.PRICES`.

    Attributes:
        now: for requests whose rank can be changed later.
        held: for those that keep theirs.
    """

    now: int = 0
    held: float = 0.0
    _fell_at: float = 0.0
    _moved_at: float = 0.0

    def move(self, needed: int, at: float) -> None:
        """Up at once, down slowly."""
        self.held = max(float(needed), self.held - (at - self._moved_at) * LEVELS / HOLD_S)
        self._moved_at = at
        falls = int((at - self._fell_at) / FALL_S)
        if needed >= self.now or falls:
            self.now, self._fell_at = max(needed, self.now - falls), at


@dataclass
class AutoRank:
    """Predicts requests, sets the price, and changes ranks by it. An observer of the engine. Thread-safe.

    Attributes:
        model: told of each step.
        sizes: of the engine.
        safety: on what is predicted.
        book: the requests in flight.
        clock: seconds that only grow; all moments are of it.
        spared_s: seconds of the last SPARED_S that the smallest ranks would have saved while somebody had objectives.
    """

    model: LatencyModel
    sizes: EngineSizes
    safety: SafetyFactor = field(default_factory=SafetyFactor)
    book: LoadBook = field(default_factory=LoadBook)
    clock: Callable[[], float] = time.monotonic
    price: Price = field(default_factory=Price)
    spared_s: float = 0.0
    _prospects: dict[Mode, Prospect] = field(default_factory=dict)
    """Of the load after the last step, as far as they were asked for."""

    @classmethod
    def of(cls, settings: Settings) -> "AutoRank":
        """For an engine of these settings."""
        sizes = EngineSizes(settings.max_running_requests, settings.max_batch_tokens, settings.prefill_chunk_tokens)
        return cls(LatencyModel(), sizes, SafetyFactor(settings.slo_target))

    def on_step(self, report: StepReport) -> None:
        """Learn from a step, and set the price for the next."""
        self.model.on_step(report)
        with self.book.lock:
            self._prospects.clear()
            self._reprice(report.seconds)
            # Merged weights cost the same at every rank.
            is_free = report.mode is Mode.MERGED and self.book.only_pair is not None
            changes = [] if is_free else [(each, each.ladder[self.price.now]) for each in self.book.movable]
        for request, rank in changes:
            if rank != request.rank:
                self.book.change_rank(request, rank)

    def on_merge(self, seconds: float) -> None:
        """Nothing: merges are made beside the steps, and slow those that they slow."""

    def predict(
        self, version: str | None, ask: Ask, arrived_at: float, merged: Set[AdapterChoice] = frozenset()
    ) -> Prediction | None:
        """What is predicted of a request for an adapter, None for the base; None while nothing can be.

        Args:
            arrived_at: moment of `clock`.
            merged: the pairs whose merged weights are held.
        """
        now = self.clock()
        with self.book.lock:
            try:
                mode = Mode.MIXED if version is not None or self.book.adapters else Mode.BASE
                mixed = self._prospect(mode, now, ask)
                ranks = self._merged_ranks(version, merged)
                as_merged = self._prospect(Mode.MERGED, now, ask) if ranks else None
            except NotReady:
                return None
            if not self.book.due:
                self.price.move(0, now)
            elapsed_s, own = now - arrived_at, self.book.columns_of(version)
            return Prediction(
                Outlook(mixed, ask, own, elapsed_s),
                self.price.now,
                int(self.price.held),
                self.safety.value,
                lambda: self._idle(mode, ask),
                Outlook(as_merged, ask, own, elapsed_s) if as_merged else None,
                ranks,
            )

    def _prospect(self, mode: Mode, now: float, ask: Ask | None = None) -> Prospect:
        if self.book.decoding:
            known = self._prospects.get(mode)
            if known is None:
                known = self._prospects[mode] = Prospect(self.model, self.book, self.sizes, mode, now)
            return known
        return Prospect(self.model, self.book, self.sizes, mode, now, ask.prompt_tokens if ask else 0)

    def _idle(self, mode: Mode, ask: Ask) -> Outlook | None:
        try:
            book = LoadBook()
            return Outlook(Prospect(self.model, book, self.sizes, mode, 0.0, ask.prompt_tokens), ask, None, 0.0)
        except NotReady:
            return None

    def _merged_ranks(self, version: str | None, merged: Set[AdapterChoice]) -> frozenset[int]:
        """The ranks at which nothing in flight keeps a request of this adapter from running merged."""
        pair = self.book.only_pair
        if version is None or not (self.book.in_flight == 0 or (pair and pair[0] == version)):
            return frozenset()
        return frozenset(each.rank for each in merged if each.version == version and (not pair or each.rank == pair[1]))

    def _reprice(self, step_s: float) -> None:
        now, needed = self.clock(), 0
        if self.book.due:
            try:
                prospect = self._prospect(Mode.MIXED if self.book.adapters else Mode.BASE, now)
            except NotReady:
                return
            spared_s = step_s * (1 - prospect.gap_s[TOP] / prospect.gap_s[self.price.now])
            self.spared_s = spared_s + self.spared_s * math.exp(-step_s / SPARED_S)
            needed = lowest_price(prospect, self.book.due, now, self.safety.value)
        self.price.move(needed, now)
