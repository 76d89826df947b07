"""The rank of every request that leaves it open, before and while it runs: one price of a column for all.

After each step of the engine and each arrival the price is set that leaves the most quality in time (`price`). Requests whose
policy is elastic move along their ladders with it; one that keeps its rank is chosen by the highest price of the last minute,
so that a calm moment does not take what the next burst needs. Without the arrivals a burst would be read, in the longest step
of all, at the ranks of the calm before it.
"""

import threading
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

from service.core import AdapterChoice, Mode, StepReport
from service.rank.ladder import LEVELS
from service.rank.latency_model import LatencyModel
from service.rank.latency_policy import Prediction
from service.rank.load import InFlight, LoadBook
from service.rank.price import best_level
from service.rank.prospect import Ask, EngineSizes, NotReady, Outlook, Prospect
from service.rank.safety import SafetyFactor
from service.settings import Settings

HOLD_S = 60.0
"""For a request that keeps its rank the price falls from the highest to none in this time."""


@dataclass
class Price:
    """Levels of `ladder.PRICES`.

    Attributes:
        now: for requests whose rank can be changed later.
        held: for those that keep theirs.
    """

    now: int = 0
    held: float = 0.0
    _moved_at: float = 0.0

    def move(self, level: int, at: float) -> None:
        """Set it; the one that is held falls slowly."""
        self.now = level
        self.held = max(float(level), self.held - (at - self._moved_at) * LEVELS / HOLD_S)
        self._moved_at = at


@dataclass
class AutoRank:
    """Predicts requests, sets the price, and changes ranks by it. An observer of the engine. Thread-safe.

    Attributes:
        model: told of each step.
        sizes: of the engine.
        safety: on what is predicted.
        book: the requests in flight.
        clock: seconds that only grow; all moments are of it.
    """

    model: LatencyModel
    sizes: EngineSizes
    safety: SafetyFactor = field(default_factory=SafetyFactor)
    book: LoadBook = field(default_factory=LoadBook)
    clock: Callable[[], float] = time.monotonic
    price: Price = field(default_factory=Price)
    _is_merged: bool = False
    """Whether the last step ran merged."""
    _following: threading.Lock = field(default_factory=threading.Lock)
    """Held around a price and the changes that it makes, so that none of an older price comes after them."""
    _prospects: dict[Mode, Prospect] = field(default_factory=dict)
    """Of the load after the last step or arrival, as far as they were asked for."""

    @classmethod
    def of(cls, settings: Settings) -> "AutoRank":
        """For an engine of these settings."""
        sizes = EngineSizes(settings.max_running_requests, settings.max_batch_tokens, settings.prefill_chunk_tokens)
        return cls(LatencyModel(), sizes, SafetyFactor(settings.slo_target))

    def on_step(self, report: StepReport) -> None:
        """Learn from a step, and set the price for the next."""
        self.model.on_step(report)
        self._is_merged = report.mode is Mode.MERGED
        self._follow()

    def on_arrival(self) -> None:
        """A request was submitted: those in flight make room for it before the next step."""
        self._follow()

    def _follow(self) -> None:
        """Set the price anew, and change the ranks by it."""
        with self._following:
            self._follow_alone()

    def _follow_alone(self) -> None:
        with self.book.lock:
            self._prospects.clear()
            self._reprice()
            # Merged weights cost the same at every rank.
            is_free = self._is_merged and self.book.only_pair is not None
            level = self.price.now
            changes = [] if is_free else [each for each in self.book.movable if each.rank != each.ladder[level]]
        for each in changes:
            self.book.change_rank(each, each.ladder[level])

    def on_merge(self, seconds: float) -> None:
        """Nothing: merges are made beside the steps, and slow those that they slow."""

    def predict(
        self,
        version: str | None,
        ask: Ask,
        arrived_at: float,
        merged: Set[AdapterChoice] = frozenset(),
        siblings: Sequence[InFlight] = (),
    ) -> Prediction | None:
        """What is predicted of a request for an adapter, None for the base; None while nothing can be.

        Args:
            arrived_at: moment of `clock`.
            merged: the pairs whose merged weights are held.
            siblings: its other sequences, as they would be submitted with it; of several, the last one's times are predicted.
        """
        now = self.clock()
        with self.book.lock:
            book = self.book.plus(siblings) if siblings else self.book
            try:
                mode = Mode.MIXED if version is not None or self.book.adapters else Mode.BASE
                mixed = self._prospect(mode, now, ask, book)
                ranks = self._merged_ranks(version, merged)
                as_merged = self._prospect(Mode.MERGED, now, ask, book) if ranks else None
            except NotReady:
                return None
            if not self.book.requests:
                self.price.move(0, now)
            elapsed_s, own = now - arrived_at, book.columns_of(version)
            return Prediction(
                Outlook(mixed, ask, own, elapsed_s),
                self.price.now,
                int(self.price.held),
                self.safety.value,
                lambda: self._idle(mode, ask),
                Outlook(as_merged, ask, own, elapsed_s) if as_merged else None,
                ranks,
                len(siblings),
            )

    def _prospect(self, mode: Mode, now: float, ask: Ask | None = None, book: LoadBook | None = None) -> Prospect:
        if book is not None and book is not self.book:
            return Prospect(self.model, book, self.sizes, mode, now, ask.prompt_tokens if ask else 0)
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
        if version is None or not merged:
            return frozenset()
        pair = self.book.only_pair
        if not (self.book.in_flight == 0 or (pair and pair[0] == version)):
            return frozenset()
        return frozenset(each.rank for each in merged if each.version == version and (not pair or each.rank == pair[1]))

    def _reprice(self) -> None:
        now = self.clock()
        if not self.book.judged:  # nobody whom a price could help
            self.price.move(0, now)
            return
        try:
            prospect = self._prospect(Mode.MIXED if self.book.adapters else Mode.BASE, now)
        except NotReady:
            return
        self.price.move(best_level(prospect, now, self.safety.value), now)
