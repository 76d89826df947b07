"""What a metric is here: statistics of each example, and a function of their sums."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adapters.evaluation.resampling import Array


@dataclass(frozen=True)
class Metric:
    """A metric as a function of statistics summed over examples.

    Attributes:
        name: as profiles, tables and plots show it, with the unit where it has one.
        higher_is_better: its direction.
        of_sums: sums [..., statistics] to values [...].
    """

    name: str
    higher_is_better: bool
    of_sums: Callable[[Array], Array]

    def value(self, statistics: Array) -> float:
        """The metric on examples with these statistics, [examples, statistics]."""
        return float(self.of_sums(statistics.sum(axis=0)))


def ratio(sums: Array, scale: float = 1.0) -> Array:
    """`scale` times the first sum over the second; 0 where the second is 0."""
    return scale * _divided(sums[..., 0], sums[..., 1])


def perplexity(sums: Array) -> Array:
    """exp of the mean loss, of sums (nats, tokens)."""
    return np.exp(ratio(sums))


def _divided(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below != 0)
