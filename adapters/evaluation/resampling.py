"""Bootstrap confidence intervals, over examples, for any metric that is a function of summed statistics.

Every metric here is computed from sums over examples: a loss from nats and tokens, corpus BLEU from matched and counted
n-grams. So a resample of the examples needs no texts: it is a row of counts, and one product of counts and statistics gives
the sums of all resamples, all ranks and all metrics at once.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

CONFIDENCE = 0.95
"""Of every interval."""

_CHUNK_NUMBERS = 4_000_000
"""Counts held at one time, 32 MB."""


@dataclass(frozen=True)
class Estimate:
    """A value on all examples, and its 95% interval by the percentile method (Efron and Tibshirani 1993, chapter 13)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: Array) -> "Estimate":
        """From the value on all examples and those of the resamples, [resamples]."""
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(resampled, (tail, 1 - tail))
        return cls(float(value), float(low), float(high))

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is; the question for a difference."""
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.high < 0


def resampled_sums(statistics: Array, resamples: int, seed: int) -> Array:
    """Sums of statistics over bootstrap resamples of the examples.

    Each resample draws as many examples as there are, with replacement; a prompt brings all of its references with it. The
    draws depend on the number of examples and on `seed` only, so that what is computed from two calls is paired (Koehn 2004).

    Args:
        statistics: [examples, statistics].
        resamples: how many.
        seed: of the draws.

    Returns:
        [resamples, statistics].
    """
    examples = statistics.shape[0]
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, statistics.shape[1]))
    chunk = max(1, _CHUNK_NUMBERS // examples)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = rng.integers(0, examples, size=(rows, examples)) + examples * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * examples).reshape(rows, examples)
        sums[start : start + rows] = counts.astype(np.float64) @ statistics
    return sums
