"""What steps cost, as measured: which of the ways to run one is the cheapest."""

from collections import defaultdict, deque
from collections.abc import Sequence

from service.core import Mode

_ENOUGH_STEPS = 32
"""The latest steps of a mode that count, and how many there must be before they do."""
_KNOWN_FOR_STEPS = 1000
"""Steps of other modes after which a mode's own are forgotten: what made them slow may have been a neighbour."""
_MARGIN = 0.95
"""A mode must take less than this share of the preferred one's time to be chosen against it."""
_LEAST_GAIN_S = 2e-4
"""And so much less: of steps of a tiny model, 5% are what the interpreter's moods make."""


class StepCosts:
    """Seconds of the latest steps, for each mode and number of rows (in powers of two).

    A step costs what the lower quartile takes: what else a machine does only adds to a step, and not to every one. Where it
    does for a while, the wrong mode may win, and only its steps would be measured from then on: so what was not measured for
    long is not known any more.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[tuple[Mode, int], deque[float]] = defaultdict(lambda: deque(maxlen=_ENOUGH_STEPS))
        self._steps_since: defaultdict[tuple[Mode, int], int] = defaultdict(int)

    def record(self, mode: Mode, rows: int, seconds: float) -> None:
        """A step of this mode has ended."""
        size = rows.bit_length()
        self._seconds[mode, size].append(seconds)
        for each in Mode:
            self._steps_since[each, size] = 0 if each is mode else self._steps_since[each, size] + 1
            if self._steps_since[each, size] == _KNOWN_FOR_STEPS:
                self._seconds[each, size].clear()

    def cheapest(self, modes: Sequence[Mode], rows: int) -> Mode:
        """The mode to run a step of so many rows in: the first of `modes`, unless another has been shown to be cheaper."""
        preferred = self._cost(modes[0], rows)
        if preferred is None:
            return modes[0]
        shown = [(cost, mode) for mode in modes[1:] if (cost := self._cost(mode, rows)) is not None]
        cost, mode = min(shown, default=(preferred, modes[0]))
        return mode if cost < min(_MARGIN * preferred, preferred - _LEAST_GAIN_S) else modes[0]

    def _cost(self, mode: Mode, rows: int) -> float | None:
        """Seconds of a step; None while too few have run."""
        seconds = self._seconds[mode, rows.bit_length()]
        return sorted(seconds)[_ENOUGH_STEPS // 4] if len(seconds) == _ENOUGH_STEPS else None
