"""The safety factor on predicted times, learned from which requests were late."""

import math

_LEAST, _MOST = 0.0, math.log(1.5)
_RESERVE = 0.5
"""The share of the misses allowed that is aimed at: what is learned from misses alone swings around its aim."""
_STEP = 0.1
"""How fast it moves, in units of its logarithm."""


class SafetyFactor:
    """The factor by which what is still to come is multiplied, so that a share of `target` of the requests is on time.

    The update is that of adaptive conformal inference (Gibbs and Candès, arXiv 2106.00170) on its logarithm: up by
    STEP * target for a request that was late, down by STEP * (1 - target) for one that was not. Whatever comes, the share that
    is late is then at most 1 - target in the long run, as long as the factor is inside its bounds.
    """

    def __init__(self, target: float = 0.99) -> None:
        self.target = target
        self.value = math.exp(_LEAST)
        self._log = _LEAST

    def observe(self, *, is_late: bool) -> None:
        """A request with objectives, whose rank was left open, has ended."""
        missed = _RESERVE * (1 - self.target)
        moved = self._log + _STEP * (1 - missed if is_late else -missed)
        self._log = max(_LEAST, min(_MOST, moved))
        self.value = math.exp(self._log)
