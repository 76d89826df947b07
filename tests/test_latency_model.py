"""The latency model on synthetic steps: no clock, no engine."""

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core import Mode, StepReport
from service.rank.latency_model import ENOUGH_STEPS, FEATURES, LatencyModel, Statistics, non_negative_least_squares
from tests.made_up_steps import some_steps, trained

STEPS = st.builds(
    StepReport,
    st.sampled_from(Mode),
    prefill_tokens=st.integers(0, 512),
    decode_rows=st.integers(0, 64),
    seconds=st.floats(1e-4, 2),
    columns=st.integers(0, 2048),
    row_ranks=st.integers(0, 8192),
    adapters=st.integers(0, 32),
    context_tokens=st.integers(1, 8192),
)


def errors(model: LatencyModel, steps: Iterator[StepReport]) -> list[float]:
    return sorted(abs((model.seconds(step) or 0.0) / step.seconds - 1) for step in steps)


def test_it_predicts_steps_that_it_has_not_seen() -> None:
    found = errors(trained(some_steps(0, 600, noise=0.05)), some_steps(1, 400))
    assert found[len(found) // 2] < 0.05
    assert found[int(0.95 * len(found))] < 0.15


def test_a_sweep_outlasts_uniform_traffic() -> None:
    model = LatencyModel(trained(some_steps(0, 300)).statistics())
    always = next(step for step in some_steps(3, 99) if step.mode is Mode.MIXED and step.decode_rows == 1)
    for _ in range(3000):
        model.on_step(always)
    found = errors(model, some_steps(1, 200))
    assert found[len(found) // 2] < 0.1


def test_it_follows_a_machine_that_becomes_slower() -> None:
    model = LatencyModel(trained(some_steps(0, 300)).statistics())
    before = errors(model, (replace(step, seconds=1.5 * step.seconds) for step in some_steps(1, 200)))
    for step in some_steps(2, 400):
        model.on_step(replace(step, seconds=1.5 * step.seconds))
    after = errors(model, (replace(step, seconds=1.5 * step.seconds) for step in some_steps(1, 200)))
    assert after[100] < 0.1 < before[100]


def test_a_dozen_steps_tell_that_the_machine_became_slower_for_all_others_too() -> None:
    model = LatencyModel(trained(some_steps(0, 300)).statistics())
    few = [step for step in some_steps(2, 400) if step.mode is Mode.MIXED and not step.prefill_tokens][:12]
    for step in few:
        model.on_step(replace(step, seconds=1.4 * step.seconds))
    others = (step for step in some_steps(1, 400) if step.mode is Mode.BASE or step.prefill_tokens)
    found = errors(model, (replace(step, seconds=1.4 * step.seconds) for step in others))
    assert found[len(found) // 2] < 0.1


def test_a_step_that_waited_for_another_process_counts_for_little() -> None:
    model = LatencyModel(trained(some_steps(0, 300)).statistics())
    for number, step in enumerate(some_steps(2, 400)):
        model.on_step(replace(step, seconds=20 * step.seconds) if number % 20 == 0 else step)
    found = errors(model, some_steps(1, 200))
    assert found[100] < 0.15


def test_what_goes_by_between_two_steps_is_part_of_what_is_predicted() -> None:
    model = trained(replace(step, pause_s=0.2 * step.seconds) for step in some_steps(0, 400))
    step = next(some_steps(1, 1))
    assert model.seconds(step) == pytest.approx(1.2 * step.seconds, rel=0.1)


def test_nothing_is_predicted_before_enough_steps() -> None:
    model = LatencyModel()
    step = next(some_steps(0, 1))
    for _ in range(int(ENOUGH_STEPS) - 1):
        model.on_step(step)
        assert model.seconds(step) is None
    for _ in range(5):
        model.on_step(step)
    assert model.is_ready
    assert model.seconds(step) == pytest.approx(step.seconds, rel=0.05)


def test_a_mode_that_was_not_seen_is_taken_for_another() -> None:
    model = trained(step for step in some_steps(0, 300) if step.mode is Mode.BASE)
    step = StepReport(Mode.MERGED, 0, 4, 1.0, context_tokens=100)
    assert model.seconds(step) == model.seconds(replace(step, mode=Mode.BASE))


@settings(max_examples=25)
@given(st.lists(STEPS, min_size=int(ENOUGH_STEPS) + 4, max_size=60), STEPS, STEPS)
def test_more_work_is_never_predicted_to_take_less(seen: list[StepReport], step: StepReport, more: StepReport) -> None:
    model = trained(replace(each, mode=step.mode) for each in seen)
    larger = StepReport(
        step.mode,
        # From a step without prompt tokens to one with some it may be corrected by another ratio.
        step.prefill_tokens,
        step.decode_rows,
        1.0,
        step.columns + more.columns,
        step.row_ranks + more.row_ranks,
        step.adapters + more.adapters,
        step.context_tokens + more.context_tokens,
    )
    less, at_least = model.seconds(step), model.seconds(larger)
    assert (less is None) == (at_least is None)
    if less is not None and at_least is not None:
        assert 0 <= less <= at_least * (1 + 1e-9)


@settings(max_examples=25)
@given(st.lists(STEPS, max_size=40), STEPS)
def test_what_is_written_down_predicts_the_same(seen: list[StepReport], step: StepReport) -> None:
    statistics = trained(iter(seen)).statistics()
    read = {mode: Statistics.from_json(json.loads(json.dumps(each.to_json()))) for mode, each in statistics.items()}
    assert LatencyModel(read).seconds(step) == LatencyModel(statistics).seconds(step)


def test_to_ask_what_was_seen_changes_nothing_of_what_is_learned() -> None:
    asked, unasked = LatencyModel(), LatencyModel()
    for step in some_steps(0, 150):
        for model in (asked, unasked):
            model.on_step(step)
        asked.statistics()
        assert asked.seconds(step) == pytest.approx(unasked.seconds(step))
    for mode, found in asked.statistics().items():
        np.testing.assert_allclose(found.gram, unasked.statistics()[mode].gram)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gram": [[1.0]]}, "of shape"),
        ({"moment": ["x"] * FEATURES}, "no number"),
        ({"moment": [float("nan")] * FEATURES}, "finite"),
        ({"steps": -1}, "no negative number"),
        ({"gram": np.triu(np.ones((FEATURES, FEATURES))).tolist()}, "symmetric"),
        ({"moment": [-1.0] * FEATURES}, "without negative"),
        ({"more": 1}, "have gram"),
        ({"steps": None}, "no number"),
    ],
)
def test_statistics_of_another_form_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Statistics.from_json({**Statistics.none().to_json(), **change})


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 8))
def test_least_squares_fulfil_the_conditions_of_a_minimum(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.random((3 * size, size))
    target = rng.random(3 * size) - 0.3
    gram, moment = rows.T @ rows, rows.T @ target
    x = non_negative_least_squares(gram, moment, np.zeros(size), sweeps=2000)
    gradient = gram @ x - moment
    assert (x >= 0).all()
    assert (np.abs(gradient[x > 1e-6]) < 1e-2).all(), "where a coordinate is free, its slope is zero"
    assert (gradient[x == 0] > -1e-2).all(), "where it is zero, it would only fall"
