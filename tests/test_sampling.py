"""Choosing tokens: agreement with transformers' processors, the distribution, and independence from the rest of the batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from service.core import GenerationRequest, SamplingParams
from service.engine.filters import highest_ids, keep_min_p, keep_top_k, keep_top_p, keep_typical
from service.engine.random_numbers import as_int64, uniform_numbers
from service.engine.sampling import Sampler
from service.engine.scheduler import Sequence

GREEDY = SamplingParams()
VOCAB = 33


def sequence(params: SamplingParams, prompt: tuple[int, ...] = (0,), answer: tuple[int, ...] = ()) -> Sequence:
    made = Sequence(GenerationRequest("r", prompt, params))
    made.tokens += answer
    return made


def sampled(seed: int, **fields: Any) -> SamplingParams:
    return SamplingParams(do_sample=True, seed=seed, **fields)


def noise(rows: int, vocabulary: int = VOCAB, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def token(logits: Tensor, params: SamplingParams, prompt: tuple[int, ...] = (0,), answer: tuple[int, ...] = ()) -> int:
    return Sampler(frozenset({2})).choose(logits[None], [sequence(params, prompt, answer)])[0].token_id


def test_greedy_takes_the_maximum_and_reports_the_models_logprob() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 3.0]])
    chosen = Sampler().choose(logits, [sequence(GREEDY), sequence(GREEDY)])
    assert [each.token_id for each in chosen] == [1, 0]
    expected = logits.log_softmax(-1)
    assert [each.logprob for each in chosen] == pytest.approx([expected[0, 1].item(), expected[1, 0].item()], rel=1e-5)


def column(values: list[float]) -> Tensor:
    return torch.tensor(values)[:, None]


@pytest.mark.parametrize("vocabulary", [5, 200, 5000])
@pytest.mark.parametrize(
    ("keep", "theirs", "values"),
    [
        (keep_top_k, TopKLogitsWarper, [1, 2, 7, 50, 10**6]),
        (keep_top_p, TopPLogitsWarper, [0.0, 0.05, 0.3, 0.7, 0.95, 0.9999]),
        (keep_min_p, MinPLogitsWarper, [0.001, 0.05, 0.3, 0.9, 1.0]),
        (keep_typical, TypicalLogitsWarper, [0.05, 0.3, 0.7, 0.95, 0.9999]),
    ],
)
def test_a_filter_keeps_what_transformers_keeps(
    keep: Callable[[Tensor, Tensor], Tensor], theirs: Callable[[Any], LogitsProcessor], values: list[Any], vocabulary: int
) -> None:
    scores = noise(len(values), vocabulary) / 3  # flat enough for nuclei of more than a thousand tokens
    together = keep(scores, column(values))
    for row, value in enumerate(values):
        expected = theirs(value)(torch.zeros(1, 1, dtype=torch.long), scores[row : row + 1])
        assert torch.equal(together[row], expected[0]), value


def test_filters_act_in_the_order_of_transformers() -> None:
    logits = noise(1, 400) / 3
    chain = [TopKLogitsWarper(30), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02), TypicalLogitsWarper(0.8)]
    scores = logits / 1.3
    for each in chain:
        scores = each(torch.zeros(1, 1, dtype=torch.long), scores)
    legal = set(scores[0].isfinite().nonzero().flatten().tolist())
    params = SamplingParams(do_sample=True, temperature=1.3, top_k=30, top_p=0.9, min_p=0.02, typical_p=0.8)
    rows = [sequence(replace(params, seed=seed)) for seed in range(2000)]
    drawn = {each.token_id for each in Sampler().choose(logits.expand(len(rows), -1), rows)}
    assert drawn <= legal
    assert len(legal) > 3
    assert drawn == legal


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    params = replace(GREEDY, repetition_penalty=penalty)
    prompt, answer = (3, 3, 7, 30), (5, 7, 1)
    for seed in range(20):
        logits = noise(1, seed=seed)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + answer]), logits.clone())
        assert token(logits[0], params, prompt, answer) == expected.argmax()


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = torch.zeros(VOCAB)
    logits[:4] = torch.tensor([10.0, 9.0, 8.0, 7.0])
    prompt = (0, 0, 1)
    assert token(logits, replace(GREEDY, presence_penalty=2.0), prompt, ()) == 0
    assert token(logits, replace(GREEDY, presence_penalty=1.5), prompt, (0, 0, 0)) == 1
    assert token(logits, replace(GREEDY, presence_penalty=0.5), prompt, (0, 0, 0)) == 0
    assert token(logits, replace(GREEDY, frequency_penalty=0.5), prompt, (0,)) == 0
    assert token(logits, replace(GREEDY, frequency_penalty=0.5), prompt, (0, 0, 0)) == 1
    assert token(logits, replace(GREEDY, frequency_penalty=1.2, presence_penalty=1.0), prompt, (0, 0, 1, 1)) == 2
    assert token(logits, replace(GREEDY, frequency_penalty=-2.0), prompt, (3, 3)) == 3


def test_bias_is_added_and_leaves_the_logprob_alone() -> None:
    logits = noise(1)
    params = replace(GREEDY, logit_bias=((5, 100.0), (6, -100.0)))
    chosen = Sampler().choose(logits, [sequence(params)])[0]
    assert chosen.token_id == 5
    assert chosen.logprob == pytest.approx(logits.log_softmax(-1)[0, 5].item(), rel=1e-5)
    best = int(logits.argmax())
    assert token(logits[0], replace(GREEDY, logit_bias=((best, -100.0),))) == logits[0].topk(2).indices[1]


def test_nothing_ends_the_answer_before_its_least_length() -> None:
    logits = torch.zeros(VOCAB)
    logits[2], logits[4], logits[9] = 3.0, 2.0, 1.0  # 2 ends a sequence
    params = replace(GREEDY, min_new_tokens=2, stop_token_ids=(4,))
    assert [token(logits, params, (0,), (1,) * count) for count in (0, 1, 2)] == [9, 9, 2]
    assert token(logits, replace(params, ignore_eos=True)) == 2


def test_alternatives_are_the_most_probable_tokens() -> None:
    logits = noise(3)
    logits[2] = 1.0
    rows = [sequence(replace(GREEDY, alternatives=count)) for count in (2, 0, 5)]
    first, second, third = Sampler().choose(logits, rows)
    values, ids = logits[0].log_softmax(-1).topk(2)
    assert [each[0] for each in first.alternatives] == ids.tolist()
    assert [each[1] for each in first.alternatives] == pytest.approx(values.tolist(), rel=1e-5)
    assert second.alternatives == ()
    assert [each[0] for each in third.alternatives] == [0, 1, 2, 3, 4]


@given(
    values=st.lists(st.sampled_from([-torch.inf, -2.0, -1.5, -0.0, 0.5, 7.0]), min_size=1, max_size=20),
    count=st.integers(1, 25),
)
def test_highest_ids_are_those_of_a_stable_sort(values: list[float], count: int) -> None:
    logits = torch.tensor([values])
    assert torch.equal(highest_ids(logits, count), logits.sort(dim=-1, descending=True, stable=True).indices[:, :count])


seeds = st.integers(0, 2**64 - 1)
any_params = st.one_of(
    st.just(GREEDY),
    st.builds(
        SamplingParams,
        repetition_penalty=st.sampled_from([1.0, 1.2, 0.7]),
        presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
        frequency_penalty=st.sampled_from([0.0, 0.3]),
        logit_bias=st.sampled_from([(), ((3, 2.0), (8, -5.0))]),
        min_new_tokens=st.sampled_from([0, 3]),
        alternatives=st.sampled_from([0, 1, 4]),
        do_sample=st.booleans(),
        seed=seeds,
        temperature=st.floats(0.1, 3.0),
        top_k=st.none() | st.integers(1, 40),
        top_p=st.sampled_from([1.0, 0.95, 0.5]),
        min_p=st.sampled_from([0.0, 0.1]),
        typical_p=st.sampled_from([1.0, 0.9]),
    ),
)
ids = st.lists(st.integers(0, VOCAB - 1), max_size=8).map(tuple)


@given(rows=st.lists(st.tuples(any_params, ids, ids), min_size=1, max_size=6), seed=st.integers(0, 99), ties=st.booleans())
def test_a_rows_token_does_not_depend_on_the_other_rows(
    rows: list[tuple[SamplingParams, tuple[int, ...], tuple[int, ...]]], seed: int, ties: bool
) -> None:
    logits = noise(len(rows), seed=seed)
    if ties:
        logits = logits.round()
    made = [sequence(params, (0, *prompt), answer) for params, prompt, answer in rows]
    eos = frozenset({2})
    together = Sampler(eos).choose(logits, made)
    alone = [Sampler(eos).choose(logits[i : i + 1], [each])[0] for i, each in enumerate(made)]
    backwards = Sampler(eos).choose(logits.flip(0), made[::-1])[::-1]
    assert [(each.token_id, [i for i, _ in each.alternatives]) for each in together] == [
        (each.token_id, [i for i, _ in each.alternatives]) for each in alone
    ]
    assert [each.token_id for each in together] == [each.token_id for each in backwards]


@given(data=st.data(), seed=st.integers(0, 99))
def test_counts_kept_from_step_to_step_are_those_counted_anew(data: st.DataObject, seed: int) -> None:
    """Sequences come, go, return after a preemption and change places; each step must choose as a fresh sampler does."""
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.4, presence_penalty=0.3)
    made = [sequence(replace(params, presence_penalty=i / 10), (i, i + 1)) for i in range(4)] + [sequence(GREEDY)]
    sampler = Sampler()
    for step in range(6):
        present = data.draw(st.lists(st.sampled_from(made), min_size=1, unique_by=id))
        logits = noise(len(present), seed=seed + step)
        chosen = [each.token_id for each in sampler.choose(logits, present)]
        assert chosen == [each.token_id for each in Sampler().choose(logits, present)]
        for each, next_id in zip(present, chosen, strict=True):
            each.tokens.append(next_id)


def chi_square(observed: Tensor, expected: Tensor) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(("seeds_drawn", "positions"), [(20_000, 1), (1, 400), (100, 50)])
def test_samples_follow_the_distribution(seeds_drawn: int, positions: int) -> None:
    probabilities = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.08, 0.04, 0.03])
    # A temperature of 0.7 restores the distribution.
    rows = [sequence(sampled(n, temperature=0.7), (0,), (0,) * i) for n in range(seeds_drawn) for i in range(positions)]
    logits = (probabilities.log() * 0.7).expand(len(rows), -1)
    ids = torch.tensor([each.token_id for each in Sampler().choose(logits, rows)])
    # Six degrees of freedom: above 22.5 once in a thousand, and the seeds are fixed.
    assert chi_square(ids.bincount(minlength=7).float(), probabilities * len(rows)) < 22.5


def test_one_broken_row_does_not_hurt_the_others() -> None:
    """Weights of an uploaded adapter may overflow; other requests of the step must not end through it."""
    logits = noise(3)
    rows = [sequence(sampled(1, top_p=0.9)), sequence(sampled(2, top_p=0.9, top_k=5)), sequence(sampled(3))]
    expected = [each.token_id for each in Sampler().choose(logits, rows)]
    logits[1] = torch.nan
    chosen = [each.token_id for each in Sampler().choose(logits, rows)]
    assert (chosen[0], chosen[2]) == (expected[0], expected[2])
    assert 0 <= chosen[1] < VOCAB


def reference_number(seed: int, index: int) -> float:
    """SplitMix64 in Python's unbounded integers."""
    low = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & low
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & low
        return z ^ (z >> 31)

    return float((mix((mix(seed & low) + (index + 1) * 0x9E3779B97F4A7C15) & low) >> 40) * 2.0**-24)


@given(pairs=st.lists(st.tuples(seeds, st.integers(0, 10**6)), min_size=1, max_size=8))
def test_uniform_numbers_are_splitmix(pairs: list[tuple[int, int]]) -> None:
    numbers = uniform_numbers(torch.tensor([as_int64(seed) for seed, _ in pairs]), torch.tensor([index for _, index in pairs]))
    assert numbers.tolist() == [reference_number(*pair) for pair in pairs]
    assert all(0 <= number < 1 for number in numbers)


def test_neighbouring_seeds_and_positions_give_unrelated_numbers() -> None:
    grid = torch.arange(50)
    numbers = uniform_numbers(grid.repeat_interleave(50), grid.repeat(50))
    assert len(set(numbers.tolist())) > 2490
