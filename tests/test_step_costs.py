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
