"""The rank that each price of a column buys."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from service.rank.ladder import LEVELS, PRICES, bounded, constant, ladder

RANKS = (1, 2, 4, 8, 16, 32, 64)
QUALITIES = st.tuples(*[st.floats(0.1, 5)] * len(RANKS)).map(lambda values: dict(zip(RANKS, values, strict=True)))


@given(QUALITIES)
def test_a_higher_price_never_buys_more(quality: dict[int, float]) -> None:
    steps = ladder(RANKS, quality)
    assert len(steps) == len(PRICES) == LEVELS
    assert sorted(steps, reverse=True) == list(steps)
    assert quality[steps[0]] == max(quality.values())
    assert steps[-1] == 1
    bought = [quality[rank] for rank in steps]
    assert bought == sorted(bought, reverse=True)


@given(QUALITIES, QUALITIES)
def test_at_one_price_no_others_of_the_same_sum_are_better(one: dict[int, float], other: dict[int, float]) -> None:
    def relative(quality: dict[int, float], rank: int) -> float:
        return quality[rank] / max(quality.values())

    for a, b in zip(ladder(RANKS, one), ladder(RANKS, other), strict=True):
        best = max(relative(one, x) + relative(other, y) for x, y in itertools.product(RANKS, repeat=2) if x + y <= a + b)
        assert relative(one, a) + relative(other, b) >= best - 1e-9


@given(QUALITIES, st.floats(0.01, 100))
def test_the_unit_of_quality_does_not_matter(quality: dict[int, float], unit: float) -> None:
    steps, scaled = ladder(RANKS, quality), ladder(RANKS, {rank: unit * value for rank, value in quality.items()})
    assert sum(a != b for a, b in zip(steps, scaled, strict=True)) <= 1  # a price at which two ranks are worth the same


def test_losses_have_a_ladder_too_and_of_equal_ranks_the_smallest_serves() -> None:
    assert ladder((1, 2, 4), {1: -3.0, 2: -2.0, 4: -2.0})[0] == 2
    assert ladder((1, 2, 4), {1: 0.0, 2: 0.0, 4: 0.0}) == constant(1)


def test_bounds_cut_both_ends() -> None:
    steps = bounded(ladder(RANKS, {rank: rank / 64 for rank in RANKS}), 4, 16)
    assert (steps[0], steps[-1]) == (16, 4)
