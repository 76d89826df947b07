"""How long a step of the engine takes: learned from the steps themselves, in a sweep at start-up and ever after.

Its time is that of the whole cycle, from the end of the step before it: what the engine does between two steps, telling clients
and setting ranks, makes those in flight wait as well, and over HTTP it is a tenth of a fast step and more.

A step's seconds are modelled as a sum of parts that each grow with its work, one sum for each mode:

    seconds = sum over k of c_k * f_k(rows, prompt tokens, context, adapters)
            + columns * (p_0 + p_1 * rows) + row_ranks * q          (mixed steps only),        all c, p, q >= 0

`columns` are the adapter columns in use, the sum over the step's distinct adapters of the largest rank among their rows;
`row_ranks` is the sum over its rows of their own ranks, the work that is left where rows are grouped by adapter. No part is
negative, so a prediction never falls as work is added, and in the rank it is a line: that makes choosing a rank cheap.

The fit is least squares on the relative error, by coordinate descent on the normal equations, which are sums over steps:
older steps fade, and what the sweep saw stays with the weight of `SWEEP_STEPS`, so that long uniform traffic does not wash
out what is known of other loads. On top of it ratios of measured to predicted seconds follow what changes faster than the fit:
one for all steps alike, within a few steps, which is the machine's speed beside what others do on it, and one for each mode and
region of load.
"""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from operator import mul
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.core import Mode, StepReport

Floats = NDArray[np.float64]

FIXED = 12
"""Features that do not depend on the rank."""
FEATURES = FIXED + 3
"""These, and columns, rows * columns, row_ranks."""
SWEEP_STEPS = 300.0
"""Steps of traffic that weigh as much as the whole sweep."""
MEMORY_STEPS = 2000.0
"""Steps after which one has faded to 1/e."""
ENOUGH_STEPS = 12.0
"""Before so many steps of any mode nothing is predicted."""

_COLUMNS = 256.0  # units that bring every feature near 1, so that one ridge suits all
_RIDGE = 1e-4
_REFIT_STEPS = 32
_FIRST_SWEEPS, _SWEEPS = 300, 10  # of the solver: from nothing, and from the last fit
_SPEED_WEIGHT, _RATIO_WEIGHT = 0.2, 0.05
"""Of a step's error, by which the ratio of all steps moves, and the ratio of its mode and region."""
_MAX_LOG_RATIO = math.log(4)
_TRUSTED_ERROR = 0.5
"""A step off by more than this, relatively, counts less: on a shared machine some steps wait for others' work."""


class StepTime(NamedTuple):
    """A step's predicted seconds, as a line in the adapter columns and ranks that it serves."""

    fixed_s: float
    per_column_s: float = 0.0
    per_row_rank_s: float = 0.0

    def at(self, columns: float, row_ranks: float) -> float:
        """Seconds with so many columns in use, and rows whose ranks have this sum."""
        return self.fixed_s + self.per_column_s * columns + self.per_row_rank_s * row_ranks


@dataclass(frozen=True)
class Statistics:
    """The normal equations of one mode: all that a fit needs to know of the steps seen.

    Attributes:
        gram: sum over steps of f f^T / seconds^2.  # [FEATURES, FEATURES]
        moment: sum over steps of f / seconds.  # [FEATURES]
        steps: their number, those faded by their share.
    """

    gram: Floats
    moment: Floats
    steps: float

    @classmethod
    def none(cls) -> "Statistics":
        """Nothing seen."""
        return cls(np.zeros((FEATURES, FEATURES)), np.zeros(FEATURES), 0.0)

    def with_steps(self, features: Floats, seconds: Floats, weights: Floats) -> "Statistics":
        """Some steps more, in their order, and each time a little less of all before.

        Args:
            features: of each.  # [steps, FEATURES]
            seconds, weights: [steps]
        """
        number = len(seconds)
        fade = 1 - 1 / MEMORY_STEPS
        faded = fade**number
        weights = weights * fade ** np.arange(number - 1, -1, -1)
        relative = features / seconds[:, None]
        weighted = weights[:, None] * relative
        return Statistics(
            faded * self.gram + weighted.T @ relative, faded * self.moment + weighted.sum(0), faded * self.steps + weights.sum()
        )

    def plus(self, other: "Statistics") -> "Statistics":
        """Both together."""
        return Statistics(self.gram + other.gram, self.moment + other.moment, self.steps + other.steps)

    def weighing(self, steps: float) -> "Statistics":
        """The same, as if it had been so many steps, if it was more."""
        share = min(1.0, steps / self.steps) if self.steps else 1.0
        return Statistics(share * self.gram, share * self.moment, share * self.steps)

    def to_json(self) -> dict[str, Any]:
        """As plain objects."""
        return {"gram": self.gram.tolist(), "moment": self.moment.tolist(), "steps": self.steps}

    @classmethod
    def from_json(cls, data: object) -> "Statistics":
        """Read `to_json`'s form.

        Raises:
            ValueError: another form, numbers that are not finite, or a matrix that no steps can have given.
        """
        if not isinstance(data, dict) or set(data) != {"gram", "moment", "steps"}:
            raise ValueError("statistics have gram, moment and steps")
        try:
            gram, moment = np.array(data["gram"], dtype=np.float64), np.array(data["moment"], dtype=np.float64)
            steps = float(data["steps"])
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"statistics hold what is no number: {error}") from None
        if gram.shape != (FEATURES, FEATURES) or moment.shape != (FEATURES,):
            raise ValueError(f"statistics are of {FEATURES} features, not of shape {gram.shape} and {moment.shape}")
        if not (np.isfinite(gram).all() and np.isfinite(moment).all() and math.isfinite(steps) and steps >= 0):
            raise ValueError("statistics are finite, and of no negative number of steps")
        if (gram < 0).any() or (moment < 0).any() or not np.allclose(gram, gram.T):
            raise ValueError("statistics of features that are never negative are a symmetric matrix without negative numbers")
        return cls(gram, moment, steps)


class LatencyModel:
    """Predicts steps from those seen. Thread-safe; who asks never waits.

    Args:
        prior: what a sweep saw, if there was one.
    """

    def __init__(self, prior: Mapping[Mode, Statistics] | None = None) -> None:
        self._lock = threading.Lock()  # guards what is learned from; what is asked for is replaced as a whole
        self._coefficients: dict[Mode, tuple[float, ...]] = {}
        self._sources: dict[Mode, tuple[Mode, tuple[float, ...]]] = {}
        """For each mode the nearest that was seen, with its coefficients."""
        self.adopt(prior or {})

    @property
    def is_ready(self) -> bool:
        """Whether it has seen enough to predict."""
        return bool(self._coefficients)

    def on_step(self, report: StepReport) -> None:
        """Learn from a step that ended."""
        if report.cycle_s > 0:
            with self._lock:
                self._observe(report)

    def on_merge(self, seconds: float) -> None:
        """Nothing: merges are made beside the steps, and slow those that they slow."""

    def _observe(self, report: StepReport) -> None:
        mode = report.mode
        predicted = self.seconds(report)
        error = math.log(report.cycle_s / predicted) if predicted else 0.0
        weight = min(1.0, _TRUSTED_ERROR / max(abs(error), 1e-9))
        unfitted = self._unfitted[mode]
        unfitted.append((report, weight))
        if predicted is not None:
            self._follow(report, error)
        if len(unfitted) >= (_REFIT_STEPS if mode in self._coefficients else 4):
            self._fit(mode, sweeps=_SWEEPS if mode in self._coefficients else _FIRST_SWEEPS)

    def seconds(self, report: StepReport) -> float | None:
        """The predicted seconds of a step, from its work alone; None as long as nothing can be predicted."""
        time = self.step_time(
            report.mode,
            decode_rows=report.decode_rows,
            prefill_tokens=report.prefill_tokens,
            context_tokens=report.context_tokens,
            adapters=report.adapters,
        )
        return None if time is None else time.at(report.columns, report.row_ranks)

    def step_time(
        self, mode: Mode, *, decode_rows: int, prefill_tokens: int, context_tokens: float, adapters: int
    ) -> StepTime | None:
        """The seconds of a step with this work, as a line in its columns and ranks.

        A mode that was not seen yet is taken for the nearest one that was. None as long as nothing can be predicted.
        """
        known = self._sources.get(mode)
        if known is None:
            return None
        source, c = known
        rows = decode_rows + prefill_tokens
        fixed = _fixed(decode_rows, prefill_tokens, context_tokens, adapters if mode is Mode.MIXED else 0)
        seconds = sum(map(mul, c, fixed))
        ratio = math.exp(self._log_speed + self._log_ratios.get(_region(source, rows, prefill_tokens), 0.0))
        if mode is not Mode.MIXED:
            return StepTime(ratio * seconds)
        per_column = (c[FIXED] + c[FIXED + 1] * rows / 64) / _COLUMNS
        return StepTime(ratio * seconds, ratio * per_column, ratio * c[FIXED + 2] / (64 * _COLUMNS))

    def statistics(self) -> dict[Mode, Statistics]:
        """All that was seen, to be the prior of another."""
        with self._lock:
            return {mode: self._prior.get(mode, Statistics.none()).plus(self._all_seen(mode)) for mode in Mode}

    def adopt(self, prior: Mapping[Mode, Statistics]) -> None:
        """Take what a sweep saw in place of all that was seen until now."""
        with self._lock:
            self._prior = dict(prior)
            self._seen = {mode: Statistics.none() for mode in Mode}
            self._log_speed = 0.0
            self._log_ratios: dict[tuple[Mode, bool, int], float] = {}
            self._unfitted: dict[Mode, list[tuple[StepReport, float]]] = {mode: [] for mode in Mode}
            for mode in Mode:
                self._fit(mode, sweeps=_FIRST_SWEEPS)

    def _follow(self, report: StepReport, error: float) -> None:
        region = _region(report.mode, report.decode_rows + report.prefill_tokens, report.prefill_tokens)
        error = _within(_TRUSTED_ERROR, error)
        self._log_speed = _within(_MAX_LOG_RATIO, self._log_speed + _SPEED_WEIGHT * error)
        self._log_ratios[region] = _within(_MAX_LOG_RATIO, self._log_ratios.get(region, 0.0) + _RATIO_WEIGHT * error)

    def _all_seen(self, mode: Mode) -> Statistics:
        """With the last steps, which are kept as they are until a fit: one at a time would take the engine's thread longer."""
        unfitted = self._unfitted[mode]
        if not unfitted:
            return self._seen[mode]
        features = np.array([_features(report) for report, _ in unfitted])
        seconds = np.array([report.cycle_s for report, _ in unfitted])
        weights = np.array([weight for _, weight in unfitted])
        return self._seen[mode].with_steps(features, seconds, weights)

    def _fit(self, mode: Mode, *, sweeps: int) -> None:
        self._seen[mode], self._unfitted[mode] = self._all_seen(mode), []
        both = self._prior.get(mode, Statistics.none()).weighing(SWEEP_STEPS).plus(self._seen[mode])
        if both.steps < ENOUGH_STEPS:
            return
        start = np.array(self._coefficients.get(mode, (0.0,) * FEATURES))
        fitted = non_negative_least_squares(both.gram, both.moment, start, sweeps=sweeps)
        known = self._coefficients = {**self._coefficients, mode: tuple(map(float, fitted))}
        nearest = {each: next(other for other in _NEAREST[each] if other in known) for each in Mode}
        self._sources = {each: (source, known[source]) for each, source in nearest.items()}


def non_negative_least_squares(gram: Floats, moment: Floats, start: Floats, *, sweeps: int) -> Floats:
    """Minimise x^T gram x - 2 moment^T x over x >= 0 by coordinate descent, with a small ridge.

    Each coordinate is set to its best value in turn (Franc, Hlavac and Navara, "Sequential coordinate-wise algorithm for the
    non-negative least squares problem", 2005), so the objective never rises.

    Args:
        gram: symmetric, positive semidefinite.  # [n, n]
        moment: [n]
        start: where to begin, not negative.  # [n]
        sweeps: times that every coordinate is set.
    """
    x = start.copy()
    diagonal = gram.diagonal() * (1 + _RIDGE) + 1e-12
    gradient = gram @ x + (diagonal - gram.diagonal()) * x - moment
    for _ in range(sweeps):
        for j in range(len(x)):
            step = max(-x[j], -gradient[j] / diagonal[j])
            if step:
                x[j] += step
                gradient += step * gram[j]
                gradient[j] += step * (diagonal[j] - gram[j, j])
    return x


_NEAREST: Mapping[Mode, tuple[Mode, ...]] = {
    Mode.BASE: (Mode.BASE, Mode.MERGED, Mode.MIXED),
    Mode.MERGED: (Mode.MERGED, Mode.BASE, Mode.MIXED),
    Mode.MIXED: (Mode.MIXED, Mode.BASE, Mode.MERGED),
}


def _fixed(decode_rows: int, prefill_tokens: int, context_tokens: float, adapters: int) -> tuple[float, ...]:
    """Pieces that bend either way in the rows: few rows wait for weights and overhead, many for arithmetic. A row that
    generates also reads a context of its own and has a token chosen.
    """
    rows = decode_rows + prefill_tokens
    return (
        1.0,
        min(rows, 4) / 4,
        min(rows, 16) / 16,
        min(rows, 64) / 64,
        rows / 64,
        max(rows - 16, 0) / 64,
        max(rows - 64, 0) / 64,
        decode_rows / 16,
        1.0 if prefill_tokens else 0.0,
        prefill_tokens / 64,
        context_tokens / 4096,
        adapters / 8,
    )


def _features(report: StepReport) -> tuple[float, ...]:
    rows = report.decode_rows + report.prefill_tokens
    is_mixed = report.mode is Mode.MIXED
    fixed = _fixed(report.decode_rows, report.prefill_tokens, report.context_tokens, report.adapters if is_mixed else 0)
    if not is_mixed:
        return (*fixed, 0.0, 0.0, 0.0)
    columns = report.columns / _COLUMNS
    return (*fixed, columns, columns * rows / 64, report.row_ranks / (64 * _COLUMNS))


def _within(limit: float, value: float) -> float:
    return max(-limit, min(limit, value))


def _region(mode: Mode, rows: int, prefill_tokens: int) -> tuple[Mode, bool, int]:
    """Loads that are corrected together: rows by powers of four, with and without prompt tokens."""
    return mode, prefill_tokens > 0, (max(rows, 1).bit_length() + 1) // 2
