"""Which rank serves a request: a pure function of what was asked, what the adapter has and what the server prefers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

from adapters.errors import IllegalRank
from adapters.quality import QualityProfile
from service.errors import InvalidRequest
from service.policies import Policy, PolicyBook, PolicyKind, RankBounds

RankWish = int | Literal["max", "auto"] | None
"""What a request says about its rank; None when it says nothing."""


EVERY_RANK = RankBounds()


class RankReason(StrEnum):
    """Why a rank was used, as X-LoRA-Rank-Reason says it."""

    REQUESTED = "requested"
    """The request named the rank, or a policy that names one."""
    QUALITY = "quality"
    BUDGET = "budget"
    FLOOR = "floor"
    """The policy's rule gave no rank at or above its floor, so the floor serves."""
    DEFAULT = "default"
    """The request said nothing, or left the choice to a policy that had nothing to choose by."""


@dataclass(frozen=True)
class RankFacts:
    """What the decision needs to know of an adapter.

    Attributes:
        ranks: legal ranks, ascending, at least one.
        quality: measured quality per rank, if any.
        parameters: legal rank to the adapter's number of parameters at that rank.
        base_parameters: the base model's number of parameters.
    """

    ranks: tuple[int, ...]
    quality: QualityProfile | None = None
    parameters: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    base_parameters: int = 0


@dataclass(frozen=True)
class RankDecision:
    """The rank that serves, why, and by which policy (`requested` where the request named the rank itself)."""

    rank: int
    reason: RankReason
    policy: str


def decide(
    wish: RankWish, policy: str | None, facts: RankFacts, book: PolicyBook, bounds: RankBounds = EVERY_RANK
) -> RankDecision:
    """Choose the rank of one request.

    Args:
        bounds: what the caller may use. What a policy chooses is brought inside them; what a request names is not changed.

    Raises:
        IllegalRank: the request names a rank that the adapter does not have.
        InvalidRequest: an unknown policy, a rank and a policy that contradict each other, or a rank outside the bounds.
    """
    allowed = bounds.of(facts.ranks)
    if wish in (None, "auto"):
        return _by_policy(policy, facts, book, _some(allowed, facts, bounds), was_silent=wish is None and policy is None)
    if policy is not None:
        raise InvalidRequest("rank_policy", f"{policy[:80]!r} contradicts rank {wish!r}; give one of the two")
    rank = facts.ranks[-1] if wish == "max" else wish
    if not isinstance(rank, int) or rank not in facts.ranks:
        raise IllegalRank(int(rank or 0), _some(allowed, facts, bounds))
    if rank not in _some(allowed, facts, bounds):
        legal = ", ".join(map(str, allowed))
        raise InvalidRequest("rank", f"{rank} is outside what this API key may use, {bounds}; legal here: {legal}, 'auto'")
    return RankDecision(rank, RankReason.REQUESTED, "requested")


def _some(allowed: tuple[int, ...], facts: RankFacts, bounds: RankBounds) -> tuple[int, ...]:
    if not allowed:
        has = ", ".join(map(str, facts.ranks))
        raise InvalidRequest("rank", f"this API key may use ranks {bounds}, and the adapter has none there; it has: {has}")
    return allowed


def _by_policy(
    policy: str | None, facts: RankFacts, book: PolicyBook, allowed: Sequence[int], *, was_silent: bool
) -> RankDecision:
    name = policy if policy is not None else book.default
    rule = book.get(name)
    rank, reason = _apply(rule, facts)
    if rank < allowed[0]:
        reason = RankReason.FLOOR
    rank = min(max(rank, allowed[0]), allowed[-1])  # a legal rank: both ends of a run of legal ranks are
    if reason is RankReason.REQUESTED and policy is None:
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


def _within(ranks: Sequence[int], policy: Policy) -> list[int]:
    """The legal ranks between floor and ceiling; if the adapter has none there, the nearest one below, else above."""
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
