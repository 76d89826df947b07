"""Safety margins on forecasts that learn from how wrong forecasts were."""

import math
import threading

from service.slo import Times

_START = math.log(1.1)
_LEAST, _MOST = math.log(0.2), math.log(20)
_STEP = 0.1
"""How fast a margin moves, in units of its logarithm."""


class Margins:
    """For each kind of time, and each level of load, the factor by which a forecast must be multiplied so that a share of
    `target` of the requests stays under it.

    The update is that of adaptive conformal inference (Gibbs and Candès, arXiv 2106.00170) on the logarithm of measured /
    predicted: up by STEP * target where the margin was passed, down by STEP * (1 - target) where it held. Whatever the
    sequence, the share that passes is then at most 1 - target in the long run, as long as the margin is inside its bounds.
    """

    def __init__(self, target: float = 0.99) -> None:
        self.target = target
        self._logs: dict[tuple[int, int], float] = {}  # (level of load, kind of time) -> logarithm of the margin
        self._lock = threading.Lock()

    def at(self, in_flight: int) -> Times:
        """The margins for a request that finds so many others in flight."""
        level = _level(in_flight)
        return Times(*(math.exp(self._logs.get((level, kind), _START)) for kind in range(3)))

    def observe(self, in_flight: int, predicted: Times, measured: Times) -> None:
        """Learn from a request that was predicted when it found so many others in flight."""
        level = _level(in_flight)
        with self._lock:
            for kind, (expected, took) in enumerate(zip(predicted, measured, strict=True)):
                if expected > 0 and took > 0:
                    self._logs[level, kind] = self._moved(self._logs.get((level, kind), _START), math.log(took / expected))

    def _moved(self, margin: float, log_ratio: float) -> float:
        moved = margin + _STEP * (self.target if log_ratio > margin else self.target - 1)
        return max(_LEAST, min(_MOST, moved))


def _level(in_flight: int) -> int:
    """0, 1, 2 to 3, 4 to 7, ...: the loads that share a margin."""
    return min(in_flight.bit_length(), 8)
