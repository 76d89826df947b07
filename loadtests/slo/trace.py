"""Who asks what and when: arrivals, adapters and lengths of an open-loop load, from a seed. Pure."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Arrivals(StrEnum):
    """How requests arrive; all have the same mean rate."""

    POISSON = "poisson"
    """Exponential gaps: coefficient of variation 1."""
    GAMMA = "gamma"
    """Bursts: gaps of a gamma distribution with coefficient of variation 3."""
    STEP = "step"
    """Poisson at half the rate, and at one and a half of it in the middle third of the time."""


@dataclass(frozen=True)
class DeadlineClass:
    """A kind of request; its deadline is `slack` times what it takes on an idle server."""

    name: str
    slack: float
    share: float


CLASSES = (DeadlineClass("interactive", 6.0, 0.5), DeadlineClass("standard", 12.0, 0.5))
GAMMA_CV = 3.0
STEP_SHARES = (0.5, 1.5)


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        at_s: its arrival.
        adapter: number of its adapter.
        prompt: its text.
        new_tokens: made exactly.
    """

    at_s: float
    adapter: int
    prompt: str
    new_tokens: int
    deadline: DeadlineClass


def trace(
    seed: int,
    *,
    arrivals: Arrivals,
    rate_per_s: float,
    seconds: float,
    adapters: int,
    lengths: Sequence[tuple[str, int]],
    zipf: float = 1.0,
) -> list[Asked]:
    """The requests of one run.

    Args:
        lengths: (prompt, tokens of its answer), drawn from with equal chances.
        zipf: popularity of adapter k is proportional to 1 / (k + 1) ** zipf.
    """
    rng = random.Random(seed)
    weights = [(number + 1) ** -zipf for number in range(adapters)]
    asked = []
    for at_s in arrival_times(rng, arrivals, rate_per_s, seconds):
        prompt, new_tokens = rng.choice(lengths)
        adapter = rng.choices(range(adapters), weights)[0]
        deadline = rng.choices(CLASSES, [each.share for each in CLASSES])[0]
        asked.append(Asked(at_s, adapter, prompt, new_tokens, deadline))
    return asked


def arrival_times(rng: random.Random, arrivals: Arrivals, rate_per_s: float, seconds: float) -> Iterator[float]:
    """Ascending moments in [0, seconds)."""
    now = 0.0
    while True:
        match arrivals:
            case Arrivals.POISSON:
                now += rng.expovariate(rate_per_s)
            case Arrivals.GAMMA:
                shape = GAMMA_CV**-2
                now += rng.gammavariate(shape, 1 / (shape * rate_per_s))
            case Arrivals.STEP:
                # The integral of the rate grows by an exponential step (inversion, Cinlar 1975).
                now = _after_step(now, rng.expovariate(1.0), rate_per_s, seconds)
        if now >= seconds:
            return
        yield now


def _after_step(now: float, work: float, rate_per_s: float, seconds: float) -> float:
    low, high = STEP_SHARES
    for end, share in ((seconds / 3, low), (2 * seconds / 3, high), (math.inf, low)):
        if now < end:
            needed = work / (share * rate_per_s)
            if now + needed <= end:
                return now + needed
            work -= (end - now) * share * rate_per_s
            now = end
    raise AssertionError("the last phase has no end")


def lognormal_lengths(seed: int, count: int, *, median_tokens: int = 28, sigma: float = 0.5, most: int = 96) -> list[int]:
    """Answer lengths where no data are given: lognormal, as answers of chat and data-to-text roughly are."""
    rng = random.Random(seed)
    return [max(2, min(most, round(rng.lognormvariate(math.log(median_tokens), sigma)))) for _ in range(count)]
