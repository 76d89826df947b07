"""Choosing tokens: the filters, the distribution, and independence from the rest of the batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.core import SamplingParams
from service.engine.sampling import Draw, choose, uniform_number

GREEDY = SamplingParams()


def sampled(seed: int, **fields: float | int) -> SamplingParams:
    return SamplingParams(do_sample=True, seed=seed, **fields)  # type: ignore[arg-type]


def test_greedy_takes_the_maximum_and_reports_the_models_logprob() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 3.0]])
    chosen = choose(logits, [Draw(GREEDY, 0), Draw(GREEDY, 5)])
    assert [each.token_id for each in chosen] == [1, 0]
    expected = logits.log_softmax(-1)
    assert [each.logprob for each in chosen] == pytest.approx([expected[0, 1].item(), expected[1, 0].item()], rel=1e-5)


params = st.one_of(
    st.just(GREEDY),
    st.builds(
        SamplingParams,
        do_sample=st.just(True),
        seed=st.integers(0, 2**64 - 1),
        temperature=st.floats(0.1, 3.0),
        top_k=st.none() | st.integers(1, 40),
        top_p=st.floats(0.05, 1.0),
    ),
)


@given(rows=st.lists(st.tuples(params, st.integers(0, 100)), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_a_rows_token_does_not_depend_on_the_other_rows(rows: list[tuple[SamplingParams, int]], seed: int) -> None:
    logits = 3 * torch.randn(len(rows), 33, generator=torch.Generator().manual_seed(seed))
    draws = [Draw(p, index) for p, index in rows]
    together = choose(logits, draws)
    alone = [choose(logits[i : i + 1], [draw])[0] for i, draw in enumerate(draws)]
    assert [each.token_id for each in together] == [each.token_id for each in alone]


@given(seed=st.integers(0, 2**63), index=st.integers(0, 2000))
def test_filters_keep_what_they_say(seed: int, index: int) -> None:
    probabilities = torch.tensor([[0.02, 0.5, 0.3, 0.15, 0.03]])
    logits = probabilities.log()

    def token(**fields: float | int) -> int:
        return choose(logits, [Draw(sampled(seed, **fields), index)])[0].token_id

    assert token(top_k=1) == 1
    assert token(top_k=2) in {1, 2}
    assert token(top_p=0.4) == 1
    assert token(top_p=0.79) in {1, 2}
    assert token(top_p=0.81) in {1, 2, 3}
    assert token(temperature=0.01) == 1


def test_samples_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    count = 4000
    logits = probabilities.log().repeat(count, 1) * 0.7  # a temperature of 0.7 restores the distribution
    draws = [Draw(sampled(11, temperature=0.7), index) for index in range(count)]
    seen = torch.bincount(torch.tensor([each.token_id for each in choose(logits, draws)]), minlength=4) / count
    assert torch.allclose(seen, probabilities, atol=4 * math.sqrt(0.25 / count))


@given(seed=st.integers(-(2**70), 2**70), index=st.integers(0, 10**6))
def test_uniform_numbers_lie_in_the_unit_interval_and_repeat(seed: int, index: int) -> None:
    number = uniform_number(seed, index)
    assert 0 <= number < 1
    assert number == uniform_number(seed, index)


def test_neighbouring_seeds_and_positions_give_unrelated_numbers() -> None:
    numbers = {uniform_number(seed, index) for seed in range(50) for index in range(50)}
    assert len(numbers) > 2490
