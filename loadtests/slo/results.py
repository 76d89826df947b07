"""What came of a run, in numbers. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        rank: that it began with; None where it was refused or failed.
        quality: the mean over its tokens of what their ranks claim.
        at_s: its moment in the trace.
        policy, reason: of its rank, as the answer says.
        server_says_met: the server's verdict.
        changes: how often its rank was changed.
    """

    rank: int | None
    quality: float
    latency_ms: float
    slo_ms: float
    server_says_met: bool | None = None
    at_s: float = 0.0
    policy: str = ""
    reason: str = ""
    changes: int = 0

    @property
    def is_met(self) -> bool:
        """Whether it was answered in time, by the client's clock."""
        return self.rank is not None and self.latency_ms <= self.slo_ms


@dataclass(frozen=True)
class Summary:
    """One run.

    Attributes:
        met: share of the requests that met their deadline.
        quality: mean quality of those; the full rank is 1.
        effective: mean quality of all, 0 for those that did not: what a user gets.
        goodput_per_s: requests a second that did.
        full_rank: share that began with the largest rank.
        changed: share whose rank was changed while they ran.
    """

    requests: int
    met: float
    quality: float
    effective: float
    goodput_per_s: float
    full_rank: float
    changed: float


def summary(outcomes: Sequence[Outcome], seconds: float, full_rank: int) -> Summary:
    """Sum up at least one request."""
    met = [each for each in outcomes if each.is_met]
    quality = sum(each.quality for each in met)
    return Summary(
        requests=len(outcomes),
        met=len(met) / len(outcomes),
        quality=quality / len(met) if met else 0.0,
        effective=quality / len(outcomes),
        goodput_per_s=len(met) / seconds,
        full_rank=sum(each.rank == full_rank for each in outcomes) / len(outcomes),
        changed=sum(each.changes > 0 for each in outcomes) / len(outcomes),
    )


def oracle(fixed: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """For each request the best outcome it had in any of several runs of the same trace, each at one rank for all.

    A bound, not a policy: no server can give every request the rank that was best for it in hindsight while all others get
    the same one.
    """
    return [max(each, key=lambda one: (one.is_met, one.quality)) for each in zip(*fixed, strict=True)]


def recovery_s(outcomes: Sequence[Outcome], begins_s: float, ends_s: float, target: float = 0.99) -> float | None:
    """Seconds after a step of load until the target is met by all who arrive from then to its end; None where it never is."""
    during = sorted((each for each in outcomes if begins_s <= each.at_s < ends_s), key=lambda each: each.at_s)
    for number, each in enumerate(during):
        rest = during[number:]
        if sum(one.is_met for one in rest) >= target * len(rest):
            return each.at_s - begins_s if number else 0.0
    return None


def spread_of(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, smallest and largest of a figure over the seeds."""
    return statistics.fmean(values), min(values), max(values)


def curve(ranks: Sequence[int]) -> Mapping[int, float]:
    """The quality that the made-up adapters claim: rising, with less and less gain, to 1 at the full rank."""
    most = ranks[-1]
    return {rank: 1 - 0.3 * (rank**-0.5 - most**-0.5) / (1 - most**-0.5) for rank in ranks}
