"""The server's knowledge of its own latency: what is predicted of a request, and what came of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from service.core import EngineProtocol, Mode
from service.rank.forecast import Ask, EngineSizes, alike, forecast
from service.rank.latency_model import LatencyModel
from service.rank.latency_policy import Outlook
from service.rank.load import Load, LoadBook
from service.rank.margins import Margins


@dataclass
class AutoRank:
    """Predicts requests, and learns from what they took.

    Attributes:
        model: an observer of the engine.
        engine: asked which weights are merged.
        book: the requests in flight.
        clock: seconds that only grow; all moments are of it.
    """

    model: LatencyModel
    engine: EngineProtocol
    sizes: EngineSizes
    margins: Margins = field(default_factory=Margins)
    book: LoadBook = field(default_factory=LoadBook)
    clock: Callable[[], float] = time.monotonic

    def outlook(self, version: str | None, ask: Ask, arrived_at: float) -> Outlook | None:
        """What is predicted of a request for an adapter, None for the base; None while nothing can be.

        Args:
            arrived_at: moment of `clock`.
        """
        now = self.clock()
        load = self.book.view(version, now)
        idle_mode = Mode.BASE if version is None else Mode.MIXED
        mode = Mode.MIXED if load.columns else idle_mode
        beside = forecast(self.model, ask, load, self.sizes, mode)
        if beside is None:
            return None
        merged_ranks = self._merged_ranks(version, load)
        return Outlook(
            forecast=beside,
            margins=self.margins.at(load.in_flight),
            alike=lambda: alike(self.model, load, load.context_tokens + ask.prompt_tokens + ask.new_tokens / 2, mode),
            idle=lambda: forecast(self.model, ask, Load(), self.sizes, idle_mode),
            merged=forecast(self.model, ask, load, self.sizes, Mode.MERGED) if merged_ranks else None,
            merged_ranks=merged_ranks,
            elapsed_ms=1000 * (now - arrived_at),
        )

    def _merged_ranks(self, version: str | None, load: Load) -> frozenset[int]:
        """The ranks at which nothing in flight keeps a request of this adapter from running merged."""
        if version is None or not (load.in_flight == 0 or load.only_rank is not None):
            return frozenset()
        held = {choice.rank for choice in self.engine.stats().merged_choices if choice.version == version}
        return frozenset(held if load.in_flight == 0 else held & {load.only_rank})
