import math

from hypothesis import given, settings
from hypothesis import strategies as st

from service.rank.margins import Margins
from service.slo import Times

PREDICTED = Times(10.0, 2.0, 100.0)


def passes(margins: Margins, ratio: float) -> bool:
    """Whether a request that takes `ratio` times what was predicted passes its margin; then it is learned from."""
    held = margins.at(3).latency_ms
    margins.observe(3, PREDICTED, PREDICTED.times(Times(ratio, ratio, ratio)))
    return ratio > held


@settings(max_examples=50)
@given(st.lists(st.floats(0.3, 10), min_size=50, max_size=400), st.floats(0.5, 0.99))
def test_whatever_comes_few_requests_pass_their_margin(ratios: list[float], target: float) -> None:
    margins = Margins(target)
    passed = sum(passes(margins, ratio) for ratio in ratios)
    # Every pass moves the margin up by 0.1 * target, every other down by 0.1 * (1 - target); it stays within its start, the
    # largest ratio and one step. (Gibbs and Candes, proposition 4.1)
    most = (1 - target) * len(ratios) + (math.log(10) + 0.1 - math.log(0.2)) / 0.1
    assert passed <= most


def test_a_margin_rises_with_violations_and_falls_without() -> None:
    margins = Margins()
    start = margins.at(3).latency_ms
    for _ in range(20):
        passes(margins, 2.0)
    risen = margins.at(3).latency_ms
    assert start < 1.9 < risen < 2.4
    for _ in range(2000):
        passes(margins, 0.5)
    assert margins.at(3).latency_ms < risen / 2


def test_loads_have_margins_of_their_own() -> None:
    margins = Margins()
    before = margins.at(40)
    passes(margins, 5.0)
    assert margins.at(40) == before
    assert margins.at(2) == margins.at(3) != before


def test_an_answer_of_one_token_tells_nothing_of_the_time_between_tokens() -> None:
    margins = Margins()
    margins.observe(0, PREDICTED, Times.measured(first_token_s=1.0, total_s=1.0, tokens=1))
    assert margins.at(0).itl_ms < margins.at(0).ttft_ms
