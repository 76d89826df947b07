"""The safety factor learns from what was late."""

import math
import random

import pytest

from service.rank.safety import SafetyFactor


@pytest.mark.parametrize("target", [0.9, 0.99])
def test_the_share_that_is_late_becomes_less_than_what_is_allowed(target: float) -> None:
    """Requests that take a lognormal multiple of what was predicted, with a deadline that the factor leaves room for."""
    rng, safety = random.Random(0), SafetyFactor(target)
    late = [observed(safety, rng.lognormvariate(0.0, 0.12)) for _ in range(20_000)]
    assert 1 - target > sum(late[5000:]) / 15_000 > 0.2 * (1 - target)


def observed(safety: SafetyFactor, ratio: float) -> bool:
    is_late = ratio > safety.value
    safety.observe(is_late=is_late)
    return is_late


def test_it_stays_in_its_bounds() -> None:
    safety = SafetyFactor()
    for _ in range(1000):
        safety.observe(is_late=True)
    assert math.isclose(safety.value, 1.5)
    for _ in range(100_000):
        safety.observe(is_late=False)
    assert math.isclose(safety.value, 1.0)
