"""Who is told what the engine does: several as one, none of whom can stop it."""

import logging
from collections.abc import Callable

from service.core import EngineObserver, StepReport

log = logging.getLogger(__name__)


class EngineObservers:
    """Several observers as one. One that raises, as it must not, keeps neither the engine nor the others from going on."""

    def __init__(self, *observers: EngineObserver) -> None:
        self._observers = observers
        self._logged: set[str] = set()

    def on_step(self, report: StepReport) -> None:
        """Tell each of a step."""
        for observer in self._observers:
            self._tell(observer, "on_step", lambda each: each.on_step(report))

    def on_merge(self, seconds: float) -> None:
        """Tell each of a merge."""
        for observer in self._observers:
            self._tell(observer, "on_merge", lambda each: each.on_merge(seconds))

    def _tell(self, observer: EngineObserver, event: str, call: Callable[[EngineObserver], None]) -> None:
        try:
            call(observer)
        except Exception:
            what = f"{event} of {type(observer).__name__}"
            if what not in self._logged:  # once, since it may be so in every step
                log.exception("%s raised, and is not told of again", what)
                self._logged.add(what)
