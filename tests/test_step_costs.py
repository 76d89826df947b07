"""Modes by what they cost."""

from service.core import Mode
from service.engine.step_costs import StepCosts

MODES = (Mode.MERGED, Mode.MIXED)


def measured(merged_s: float, mixed_s: float, *, steps: int = 40, rows: int = 8) -> StepCosts:
    costs = StepCosts()
    for _ in range(steps):
        costs.record(Mode.MERGED, rows, merged_s)
        costs.record(Mode.MIXED, rows, mixed_s)
    return costs


def test_the_preferred_mode_runs_until_another_is_shown_to_be_cheaper() -> None:
    assert StepCosts().cheapest(MODES, 8) is Mode.MERGED
    assert measured(2.0, 1.0, steps=5).cheapest(MODES, 8) is Mode.MERGED
    assert measured(2.0, 1.0).cheapest(MODES, 8) is Mode.MIXED
    assert measured(2.0, 1.95).cheapest(MODES, 8) is Mode.MERGED
    assert measured(1.0, 2.0).cheapest(MODES, 8) is Mode.MERGED


def test_numbers_of_rows_are_told_apart_and_the_latest_steps_count() -> None:
    costs = measured(2.0, 1.0)
    assert costs.cheapest(MODES, 9) is Mode.MIXED
    assert costs.cheapest(MODES, 32) is Mode.MERGED
    for _ in range(60):
        costs.record(Mode.MERGED, 8, 0.5)
    assert costs.cheapest(MODES, 8) is Mode.MERGED


def test_a_mode_that_was_slow_for_a_while_is_tried_again() -> None:
    costs = measured(0.015, 0.010)
    modes = []
    for _ in range(2000):
        modes.append(costs.cheapest(MODES, 8))
        costs.record(modes[-1], 8, 0.009 if modes[-1] is Mode.MERGED else 0.010)
    assert modes[0] is Mode.MIXED
    assert modes.count(Mode.MERGED) > 900


def test_a_mode_that_stays_slow_is_seldom_tried() -> None:
    costs = measured(0.015, 0.010)
    merged = 0
    for _ in range(10_000):
        mode = costs.cheapest(MODES, 8)
        merged += mode is Mode.MERGED
        costs.record(mode, 8, 0.015 if mode is Mode.MERGED else 0.010)
    assert 0 < merged < 400
