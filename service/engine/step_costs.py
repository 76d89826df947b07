"""What steps cost, as measured: which of the ways to run one is the cheapest."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.core import Mode

_MEMORY = 0.1
"""Weight of the newest step in the running mean."""
_ENOUGH_STEPS = 32
"""Steps of a mode before its mean is believed."""
_MARGIN = 0.95
"""A mode must take less than this share of the preferred one's time to be chosen against it: means are noisy."""


@dataclass
class _Mean:
    steps: int = 0
    seconds: float = 0.0


class StepCosts:
    """Running means of the seconds of a step, for each mode and number of rows (in powers of two)."""

    def __init__(self) -> None:
        self._means: dict[tuple[Mode, int], _Mean] = {}

    def record(self, mode: Mode, rows: int, seconds: float) -> None:
        """A step of this mode has ended."""
        mean = self._means.setdefault((mode, rows.bit_length()), _Mean())
        mean.steps += 1
        mean.seconds += max(_MEMORY, 1 / mean.steps) * (seconds - mean.seconds)

    def cheapest(self, modes: Sequence[Mode], rows: int) -> Mode:
        """The mode to run a step of so many rows in: the first of `modes`, unless another has been shown to be cheaper."""
        preferred = self._means.get((modes[0], rows.bit_length()), _Mean())
        if preferred.steps < _ENOUGH_STEPS:
            return modes[0]
        others = [(mode, self._means.get((mode, rows.bit_length()), _Mean())) for mode in modes[1:]]
        shown = [(mean.seconds, mode) for mode, mean in others if mean.steps >= _ENOUGH_STEPS]
        seconds, mode = min(shown, default=(preferred.seconds, modes[0]))
        return mode if seconds < _MARGIN * preferred.seconds else modes[0]
