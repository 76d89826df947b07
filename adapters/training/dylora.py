"""What a DyLoRA run is asked for, and the rank that each of its steps trains."""

import bisect
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from adapters.config import AdapterConfig, AdapterKind
from adapters.errors import InvalidAdapter

ALL_LINEAR = "all-linear"
"""Target every linear module but the output head."""


class RankDistribution(StrEnum):
    """p_B, from which each step's rank is drawn (arXiv 2210.07558, section 4.1)."""

    UNIFORM = "uniform"
    GEOMETRIC = "geometric"
    """The i-th legal rank has weight (1 - p) ** (i - 1), cut at the last and normalised."""
    WEIGHTS = "weights"
    """As `DyLoRAConfig.weights` states."""


class UpdateRule(StrEnum):
    """Which rows and columns a step at rank b may move."""

    FULL = "full"
    """All of 1..b."""
    FROZEN = "frozen"
    """Only b itself; all others stay as they are, to the bit. Needs an optimiser that keeps to that: see `row_adamw`."""

    def rows(self, rank: int) -> tuple[int, int]:
        """Rows of A and columns of B, from the first up to but without the second, that a step at `rank` moves."""
        return (rank - 1 if self is UpdateRule.FROZEN else 0), rank


class RankPer(StrEnum):
    """What has a rank of its own in training."""

    STEP = "step"
    """The optimiser step: one rank for all rows, as the paper has it."""
    ROW = "row"
    """Each row of the batch. Not in the paper: every step then trains all ranks, for the price of one pass, and a rank's
    share of the rows is its probability rather than a matter of luck."""


@dataclass(frozen=True)
class DyLoRAConfig:
    """A nested adapter to be trained.

    Attributes:
        r_max: rows of A and columns of B.
        alpha, rslora: scale alpha / b at rank b, or alpha / sqrt(b) with rslora.
        ranks: the ranks that are trained and legal afterwards; all of 1..r_max unless given.
        distribution, geometric_p, weights: how each rank is drawn; `weights` has one entry per rank.
        rank_per: whether a rank is drawn for each optimiser step or for each row of its batch.
        targets: module path suffixes, or "all-linear".
        dropout: on the input of A, in training.
        init_scale: what A's first values are multiplied with, LoRA's own being Kaiming uniform. Not in the paper: B starts at
            zero, so it changes no output, but how soon a row of A turns to where the gradient points.
        update: which rows and columns a step moves.
        sandwich: train every step at r_max too, the step's loss being the mean of both passes. Not in the paper: it
            spends a second pass on the full rank, which plain DyLoRA reaches only once in r_max steps.
    """

    r_max: int = 8
    alpha: float = 16.0
    rslora: bool = False
    ranks: tuple[int, ...] = ()
    distribution: RankDistribution = RankDistribution.UNIFORM
    geometric_p: float = 0.15
    weights: tuple[float, ...] = ()
    rank_per: RankPer = RankPer.STEP
    targets: tuple[str, ...] | str = ALL_LINEAR
    dropout: float = 0.0
    init_scale: float = 1.0
    update: UpdateRule = UpdateRule.FULL
    sandwich: bool = False

    def __post_init__(self) -> None:
        legal = self.adapter_config().ranks
        problems = []
        if not 0 < self.geometric_p < 1:
            problems.append(f"geometric_p must lie between 0 and 1, not {self.geometric_p}")
        elif self.distribution is not RankDistribution.GEOMETRIC and self.geometric_p != type(self).geometric_p:
            problems.append("geometric_p is given, but distribution is not 'geometric'")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not 0 < self.init_scale < math.inf:
            problems.append(f"init_scale must be above 0, not {self.init_scale}: with A and B at zero nothing is ever learnt")
        if self.distribution is RankDistribution.WEIGHTS:
            if len(self.weights) != len(legal) or min(self.weights, default=0) < 0 or not sum(self.weights) > 0:
                problems.append(f"weights must be {len(legal)} numbers, none negative, not all 0; one for each rank")
        elif self.weights:
            problems.append("weights are given, but distribution is not 'weights'")
        if self.sandwich and self.update is UpdateRule.FROZEN:
            problems.append("sandwich trains two ranks in a step, update 'frozen' one row: choose one of them")
        if self.rank_per is RankPer.ROW and (self.sandwich or self.update is UpdateRule.FROZEN):
            problems.append("sandwich and update 'frozen' are for one rank per step: with rank_per 'row' choose neither")
        if problems:
            raise InvalidAdapter(problems)

    def adapter_config(self, base_model: str | None = None, labels: tuple[str, ...] = ()) -> AdapterConfig:
        """The facts that outlive training; `labels` are a classifier's."""
        return AdapterConfig(AdapterKind.DYLORA, self.r_max, self.alpha, self.rslora, self.ranks, base_model, labels)

    def rank_weights(self) -> tuple[float, ...]:
        """Unnormalised probability of each legal rank."""
        count = len(self.adapter_config().ranks)
        if self.distribution is RankDistribution.WEIGHTS:
            return self.weights
        if self.distribution is RankDistribution.GEOMETRIC:
            return tuple((1 - self.geometric_p) ** i for i in range(count))
        return (1.0,) * count

    def draw(self, seed: int, step: int) -> int:
        """The rank drawn for optimiser step `step`.

        A function of seed and step alone, so that all layers, micro-batches and data-parallel workers of a step agree,
        and a resumed run draws what the uninterrupted one would have.
        """
        ranks: Sequence[int] = self.adapter_config().ranks
        return random.Random(f"dylora {seed} {step}").choices(ranks, self.rank_weights())[0]

    def passes(self, seed: int, step: int) -> tuple[int, ...]:
        """The ranks at which step `step` runs the model, once each."""
        drawn = self.draw(seed, step)
        return tuple(dict.fromkeys((self.r_max, drawn))) if self.sandwich else (drawn,)

    def draw_rows(self, seed: int, step: int, rows: int) -> tuple[int, ...]:
        """The rank of each row of optimiser step `step`, whose batch has `rows` rows over all micro-batches and workers.

        Systematic sampling: how often a rank comes up is its probability times `rows`, rounded up or down, and right on
        average over steps. Like `draw` a function of its arguments alone.
        """
        rng = random.Random(f"dylora rows {seed} {step}")
        shares = list(itertools.accumulate(self.rank_weights()))
        start = rng.random()
        points = [(start + i) / rows * shares[-1] for i in range(rows)]
        ranks = [self.adapter_config().ranks[bisect.bisect_right(shares[:-1], point)] for point in points]
        rng.shuffle(ranks)
        return tuple(ranks)
