"""Which rank serves a request: a pure function of what was asked, what the adapter has and what the server prefers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from adapters.errors import IllegalRank
from adapters.quality import QualityProfile
from service.errors import InvalidRequest, SloUnattainable
from service.rank.ladder import TOP, Ladder, bounded, constant, ladder
from service.rank.latency_policy import Prediction, best_rank
from service.rank.policies import Policy, PolicyBook, PolicyKind, RankBounds, WhenUnattainable
from service.rank.quality_curve import quality_by_rank
from service.slo import NO_SLO, Slo, Times

RankWish = int | Literal["max", "auto"] | None
"""What a request says about its rank; None when it says nothing."""


EVERY_RANK = RankBounds()


class RankReason(StrEnum):
    """Why a rank was used, as X-LoRA-Rank-Reason says it."""

    REQUESTED = "requested"
    """The request named the rank, or a policy that names one."""
    SLO = "slo"
    """The best that is predicted to meet the latency objectives."""
    QUALITY = "quality"
    BUDGET = "budget"
    FLOOR = "floor"
    """The policy's rule gave no rank at or above its floor, so the floor serves, to the end."""
    DEFAULT = "default"
    """The request said nothing, or left the choice to a policy that had nothing to choose by."""


@dataclass(frozen=True)
class RankFacts:
    """What the decision needs to know of an adapter.

    Attributes:
        ranks: legal ranks, ascending, at least one.
        quality: measured quality per rank, if any.
        prior: a guess in its place, which only the latency policy uses.
        parameters: legal rank to the adapter's number of parameters at that rank.
        base_parameters: the base model's number of parameters.
    """

    ranks: tuple[int, ...]
    quality: QualityProfile | None = None
    parameters: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    base_parameters: int = 0
    prior: QualityProfile | None = None

    @cached_property
    def quality_by_rank(self) -> Mapping[int, float]:
        """Every legal rank's quality, measured or guessed; higher is better."""
        return quality_by_rank(self.ranks, self.quality or self.prior)

    def ladder(self, least: int, most: int) -> Ladder:
        """The rank between two legal ones at each price of a column."""
        known = self._ladders.get((least, most))
        if known is None:
            known = bounded(self._ladders[self.ranks[0], self.ranks[-1]], least, most)
            self._ladders[least, most] = known
        return known

    @cached_property
    def _ladders(self) -> dict[tuple[int, int], Ladder]:
        return {(self.ranks[0], self.ranks[-1]): ladder(self.ranks, self.quality_by_rank)}


@dataclass(frozen=True)
class RankDecision:
    """The rank that serves, and why.

    Attributes:
        policy: its name; `requested` where the request named the rank itself.
        slo: the latency objectives that the request is measured by.
        predicted: its times at this rank, where they could be predicted.
        ladder: the rank that it would have at each price of a column.
        is_elastic: whether its rank follows the price while it runs.
    """

    rank: int
    reason: RankReason
    policy: str
    slo: Slo = NO_SLO
    predicted: Times | None = None
    ladder: Ladder = ()
    is_elastic: bool = False

    def __post_init__(self) -> None:
        if not self.ladder:
            object.__setattr__(self, "ladder", constant(self.rank))


def decide(
    wish: RankWish,
    policy: str | None,
    facts: RankFacts,
    book: PolicyBook,
    bounds: RankBounds = EVERY_RANK,
    *,
    slo: Slo = NO_SLO,
    prediction: Prediction | None = None,
) -> RankDecision:
    """Choose the rank of one request.

    Objectives choose the rank by the policy "latency", unless the policy in force is another one of that kind. Beside a rank
    that the request names they are only measured.

    Args:
        bounds: what the caller may use. What a policy chooses is brought inside them; what a request names is not changed.
        slo: objectives of the request itself.
        prediction: what is predicted of it; None while nothing can be.

    Raises:
        IllegalRank: the request names a rank that the adapter does not have.
        InvalidRequest: an unknown policy, a rank and a policy that contradict each other, or a rank outside the bounds;
            objectives beside a policy that does not choose by latency.
        SloUnattainable: no rank is predicted to meet the objectives, and the policy refuses such requests; or not even an
            idle server could meet them.
    """
    decision = _decide(wish, policy, facts, book, bounds, slo, prediction)
    if prediction is None or decision.predicted is not None:
        return decision
    prediction.check_possible(decision.slo, decision.rank, decision.policy)
    return replace(decision, predicted=prediction.at(decision.rank))


def _decide(
    wish: RankWish,
    policy: str | None,
    facts: RankFacts,
    book: PolicyBook,
    bounds: RankBounds,
    slo: Slo,
    prediction: Prediction | None,
) -> RankDecision:
    allowed = bounds.of(facts.ranks)
    if wish in (None, "auto"):
        allowed = _some(allowed, facts, bounds)
        name = _policy_name(policy, book, slo)
        if book.get(name).kind is PolicyKind.LATENCY:
            return _by_latency(name, facts, book, allowed, slo, prediction)
        return _by_policy(name, facts, book, allowed, is_named=policy is not None, was_silent=wish is None and policy is None)
    if policy is not None:
        raise InvalidRequest("rank_policy", f"{policy[:80]!r} contradicts rank {wish!r}; give one of the two")
    rank = facts.ranks[-1] if wish == "max" else wish
    if not isinstance(rank, int) or rank not in facts.ranks:
        raise IllegalRank(int(rank or 0), _some(allowed, facts, bounds))
    if rank not in _some(allowed, facts, bounds):
        legal = ", ".join(map(str, allowed))
        raise InvalidRequest("rank", f"{rank} is outside what this API key may use, {bounds}; legal here: {legal}, 'auto'")
    return RankDecision(rank, RankReason.REQUESTED, "requested", slo)


def _some(allowed: tuple[int, ...], facts: RankFacts, bounds: RankBounds) -> tuple[int, ...]:
    if not allowed:
        has = ", ".join(map(str, facts.ranks))
        raise InvalidRequest("rank", f"this API key may use ranks {bounds}, and the adapter has none there; it has: {has}")
    return allowed


def _policy_name(policy: str | None, book: PolicyBook, slo: Slo) -> str:
    """The policy in force."""
    name = policy if policy is not None else book.default
    if slo.is_empty or book.get(name).kind is PolicyKind.LATENCY:
        return name
    if policy is not None:
        raise InvalidRequest(
            "rank_policy", f"{policy[:80]!r} does not choose by latency and contradicts {slo}; give one of them"
        )
    return PolicyKind.LATENCY.value


def _by_latency(
    name: str, facts: RankFacts, book: PolicyBook, allowed: Sequence[int], slo: Slo, prediction: Prediction | None
) -> RankDecision:
    rule = book.get(name)
    ranks: Sequence[int] = _within(facts.ranks, rule)
    if ranks[0] < allowed[0] or ranks[-1] > allowed[-1]:
        ranks = [rank for rank in ranks if allowed[0] <= rank <= allowed[-1]] or [_nearest(allowed, rule.floor)]
    slo = slo.over(rule.slo)
    steps = facts.ladder(ranks[0], ranks[-1])
    if slo.is_empty:  # nothing to choose by
        return RankDecision(ranks[-1], RankReason.DEFAULT, name)
    if prediction is None:
        return RankDecision(ranks[-1], RankReason.DEFAULT, name, slo, ladder=steps, is_elastic=rule.elastic)
    best = best_rank(prediction, slo, ranks, steps, facts.quality_by_rank, is_elastic=rule.elastic)
    if best is not None:
        return RankDecision(best.rank, RankReason.SLO, name, slo, best.predicted, steps, rule.elastic)
    predicted = prediction.at(ranks[0], TOP)
    if not slo.is_met_by(predicted):
        prediction.check_possible(slo, ranks[0], name)
    if rule.when_unattainable is WhenUnattainable.REFUSE and prediction.in_flight:
        when = f"beside the {prediction.in_flight} requests in flight"
        raise SloUnattainable(name, slo, ranks[0], predicted, when, is_for_good=False)
    if prediction.is_moved_by_rank(steps):
        return RankDecision(ranks[0], RankReason.FLOOR, name, slo, predicted)
    return RankDecision(steps[0], RankReason.DEFAULT, name, slo, prediction.at(steps[0]), steps, rule.elastic)


def _nearest(ranks: Sequence[int], bound: int) -> int:
    return min(ranks, key=lambda rank: abs(rank - bound))


def _by_policy(
    name: str, facts: RankFacts, book: PolicyBook, allowed: Sequence[int], *, is_named: bool, was_silent: bool
) -> RankDecision:
    rank, reason = _apply(book.get(name), facts)
    if rank < allowed[0]:
        reason = RankReason.FLOOR
    rank = min(max(rank, allowed[0]), allowed[-1])  # a legal rank: both ends of a run of legal ranks are
    if reason is RankReason.REQUESTED and not is_named:
        reason = RankReason.DEFAULT
    return RankDecision(rank, RankReason.DEFAULT if was_silent else reason, name)


def _apply(policy: Policy, facts: RankFacts) -> tuple[int, RankReason]:
    """A legal rank by the policy's rule, and the reason as if a request had named the policy."""
    allowed = _within(facts.ranks, policy)
    match policy.kind:
        case PolicyKind.FIXED:
            return _at_most(allowed, policy.rank or 1), RankReason.REQUESTED
        case PolicyKind.MAX:
            return allowed[-1], RankReason.REQUESTED
        case PolicyKind.QUALITY:
            return _by_quality(policy, facts, allowed)
        case PolicyKind.BUDGET:
            return _by_budget(policy, facts, allowed)
        case PolicyKind.LATENCY:
            raise AssertionError("a latency policy needs a prediction, and is applied by _by_latency")


def _within(ranks: Sequence[int], policy: Policy) -> Sequence[int]:
    """The legal ranks between floor and ceiling; if the adapter has none there, the nearest one below, else above."""
    if policy.floor <= ranks[0] and policy.ceiling is None:
        return ranks
    ceiling = ranks[-1] if policy.ceiling is None else policy.ceiling
    return [r for r in ranks if policy.floor <= r <= ceiling] or [_at_most(ranks, ceiling)]


def _at_most(ranks: Sequence[int], bound: int) -> int:
    """The largest rank up to the bound, else the smallest there is."""
    return max((r for r in ranks if r <= bound), default=ranks[0])


def _by_quality(policy: Policy, facts: RankFacts, allowed: Sequence[int]) -> tuple[int, RankReason]:
    measured = {} if facts.quality is None else facts.quality.primary.values
    known = {r: measured[r] for r in facts.ranks if r in measured}
    candidates = [r for r in allowed if r in known]
    if facts.quality is None or not candidates:
        return allowed[-1], RankReason.DEFAULT  # nothing measured: the full adapter is the only safe answer
    sign = 1.0 if facts.quality.primary.higher_is_better else -1.0
    gain = {r: sign * value for r, value in known.items()}
    best = max(gain.values())
    # Relative to the magnitude, so that negative metrics (log likelihood) work as well.
    least = best - policy.tolerance * abs(best)
    enough = [r for r in known if gain[r] >= least]
    good = [r for r in candidates if gain[r] >= least]
    if not good:  # the ceiling is below every good rank: serve the best of what it leaves
        return max(candidates, key=lambda r: gain[r]), RankReason.QUALITY
    return good[0], RankReason.FLOOR if enough[0] < policy.floor else RankReason.QUALITY


def _by_budget(policy: Policy, facts: RankFacts, allowed: Sequence[int]) -> tuple[int, RankReason]:
    limit = policy.share * facts.base_parameters
    affordable = [r for r in allowed if facts.parameters.get(r, limit + 1) <= limit]
    if not affordable:
        return allowed[0], RankReason.FLOOR
    return affordable[-1], RankReason.BUDGET
