"""The rules by which a server may choose a rank, as its configuration names them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cached_property
from typing import ClassVar

from service.errors import InvalidRequest
from service.slo import Slo


class PolicyKind(StrEnum):
    """The rules by which a rank can be chosen."""

    FIXED = "fixed"
    """Always `rank`, or the nearest below it that the adapter has."""
    MAX = "max"
    """The adapter's largest rank."""
    QUALITY = "quality"
    """The smallest rank whose measured quality is within `tolerance` of the best."""
    BUDGET = "budget"
    """The largest rank whose adapter work per token stays under `share` of the base model's."""
    LATENCY = "latency"
    """The rank of the highest quality that is predicted to meet the latency objectives."""


class WhenUnattainable(StrEnum):
    """What becomes of a request whose objectives no rank is predicted to meet beside what is in flight."""

    SERVE = "serve"
    """It is served at the floor."""
    REFUSE = "refuse"
    """It is answered with 503, unless nothing else is in flight."""


_BOUNDS = ("floor", "ceiling")
_OBJECTIVES = ("latency_slo_ms", "ttft_slo_ms", "itl_slo_ms")
FIELDS_OF: Mapping[PolicyKind, tuple[str, ...]] = {
    PolicyKind.FIXED: ("rank",),
    PolicyKind.MAX: _BOUNDS,
    PolicyKind.QUALITY: ("tolerance", *_BOUNDS),
    PolicyKind.BUDGET: ("share", *_BOUNDS),
    PolicyKind.LATENCY: (*_OBJECTIVES, "when_unattainable", "elastic", *_BOUNDS),
}
"""What each kind looks at beside its name."""


@dataclass(frozen=True)
class Policy:
    """One named rule, as the server's configuration states it. A field that its kind does not look at keeps its default.

    Attributes:
        rank: the rank of a fixed policy, at least 1.
        tolerance: relative loss of the primary metric that a quality policy accepts; 0.01 is one percent.
        share: adapter parameters at the rank over base parameters, the bound of a budget policy.
        floor: no smaller rank is chosen where the adapter has a larger one.
        ceiling: no larger rank is chosen where the adapter has a smaller one; None for no bound.
        latency_slo_ms, ttft_slo_ms, itl_slo_ms: objectives of a latency policy, where a request names none at all.
        when_unattainable: what a latency policy does at the floor.
        elastic: a latency policy may change the rank of a request while it runs.
    """

    kind: PolicyKind
    rank: int | None = None
    tolerance: float = 0.01
    share: float = 0.05
    floor: int = 1
    ceiling: int | None = None
    latency_slo_ms: float | None = None
    ttft_slo_ms: float | None = None
    itl_slo_ms: float | None = None
    when_unattainable: WhenUnattainable = WhenUnattainable.SERVE
    elastic: bool = True

    # Read by pydantic where a policy comes from JSON: a misspelt key must not be dropped.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        legal = FIELDS_OF[self.kind]
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name not in ("kind", *legal) and value != each.default:
                raise ValueError(f"{each.name} {value} is not for kind {self.kind.value!r}; legal: {', '.join(legal)}")
        if self.kind is PolicyKind.FIXED and self.rank is None:
            raise ValueError("rank must be given for kind 'fixed'")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be from 0 to below 1, not {self.tolerance}")
        if not self.share > 0:
            raise ValueError(f"share must be above 0, not {self.share}")
        if self.floor < 1:
            raise ValueError(f"floor must be at least 1, not {self.floor}")
        if self.ceiling is not None and self.ceiling < self.floor:
            raise ValueError(f"ceiling must be at least the floor {self.floor}, not {self.ceiling}")
        _ = self.slo  # which checks its own values

    @cached_property
    def slo(self) -> Slo:
        """The objectives of a latency policy. Raises ValueError if one is not above 0."""
        return Slo(self.latency_slo_ms, self.ttft_slo_ms, self.itl_slo_ms)


@dataclass(frozen=True)
class RankBounds:
    """The ranks that a caller may use, whatever the policy: from `floor` to `ceiling`, None for no bound above."""

    floor: int = 1
    ceiling: int | None = None

    def of(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """Those of an adapter's ranks that are allowed."""
        if self.floor == 1 and self.ceiling is None:  # of most callers, and this is asked for every request
            return tuple(ranks)
        return tuple(r for r in ranks if r >= self.floor and (self.ceiling is None or r <= self.ceiling))

    def __str__(self) -> str:
        return f"{self.floor} or more" if self.ceiling is None else f"{self.floor} to {self.ceiling}"


@dataclass(frozen=True)
class PolicyBook:
    """All policies by name, and the one that serves where a request leaves the choice open."""

    policies: Mapping[str, Policy]
    default: str

    def __post_init__(self) -> None:
        if self.default not in self.policies:
            raise ValueError(f"{self.default!r} is no policy; legal: {', '.join(sorted(self.policies))}")

    def with_default(self, name: str | None) -> "PolicyBook":
        """The same policies with another default, if one is given.

        Raises:
            ValueError: there is no policy of that name.
        """
        return self if name is None else replace(self, default=name)

    def get(self, name: str) -> Policy:
        """The policy of that name.

        Raises:
            InvalidRequest: there is none; the legal names are listed.
        """
        try:
            return self.policies[name]
        except KeyError:
            legal = ", ".join(sorted(self.policies))
            raise InvalidRequest("rank_policy", f"no policy named {name[:80]!r}; legal: {legal}") from None
