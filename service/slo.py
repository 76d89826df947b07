"""What a client may demand of a request's latency, and how it is compared with what happened."""

from dataclasses import dataclass, fields
from typing import NamedTuple


class Times(NamedTuple):
    """A request's times in milliseconds, predicted or measured, from its arrival.

    Attributes:
        ttft_ms: to its first token.
        itl_ms: between two tokens, in the mean over the answer; 0 for an answer of one token.
        latency_ms: to its last token.
    """

    ttft_ms: float
    itl_ms: float
    latency_ms: float

    @classmethod
    def measured(cls, *, first_token_s: float, total_s: float, tokens: int) -> "Times":
        """Of a request that has ended, from its moments after arrival."""
        gap_s = (total_s - first_token_s) / (tokens - 1) if tokens > 1 else 0.0
        return cls(1000 * first_token_s, 1000 * gap_s, 1000 * total_s)

    def times(self, factors: "Times") -> "Times":
        """Each multiplied by its own factor."""
        return Times(self.ttft_ms * factors.ttft_ms, self.itl_ms * factors.itl_ms, self.latency_ms * factors.latency_ms)


@dataclass(frozen=True)
class Slo:
    """Service level objectives of one request, in milliseconds; None where there is none."""

    latency_ms: float | None = None
    ttft_ms: float | None = None
    itl_ms: float | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{each.name} must be above 0 and finite, not {value}")

    @property
    def is_empty(self) -> bool:
        """Whether nothing is demanded."""
        return self.latency_ms is None and self.ttft_ms is None and self.itl_ms is None

    def is_met_by(self, times: Times) -> bool:
        """Whether every objective is met."""
        return not (
            (self.latency_ms is not None and times.latency_ms > self.latency_ms)
            or (self.ttft_ms is not None and times.ttft_ms > self.ttft_ms)
            or (self.itl_ms is not None and times.itl_ms > self.itl_ms)
        )

    def over(self, fallback: "Slo") -> "Slo":
        """This, or the fallback where nothing at all is demanded here."""
        return fallback if self.is_empty else self

    def __str__(self) -> str:
        named = ((f"{each.name.removesuffix('_ms')}_slo_ms", getattr(self, each.name)) for each in fields(self))
        return ", ".join(f"{name} {value:g}" for name, value in named if value is not None)


NO_SLO = Slo()
