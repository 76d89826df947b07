"""The sums that say what is in flight."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.rank.ladder import Ladder, bounded, constant, ladder
from service.rank.load import TRAFFIC_S, InFlight, LoadBook

FULL = ladder((1, 2, 4, 8), {1: 0.5, 2: 0.7, 4: 0.9, 8: 1.0})
LADDERS: tuple[Ladder, ...] = (FULL, bounded(FULL, 2, 4), constant(8), constant(1))
REQUESTS = st.lists(
    st.tuples(st.sampled_from([None, "a", "b"]), st.sampled_from(LADDERS), st.integers(1, 50), st.integers(1, 20)),
    max_size=12,
)


@settings(max_examples=60)
@given(REQUESTS, st.randoms(use_true_random=False))
def test_the_sums_are_those_of_the_requests_in_flight(made: list[tuple[str | None, Ladder, int, int]], rng: object) -> None:
    book = LoadBook()
    live: list[InFlight] = []
    told: list[int] = []
    for version, steps, prompt, new in made:
        own = steps if version else constant(0)
        request = InFlight(version, own, own[0], prompt, new, change=told.append)
        book.add(request, 0.0)
        live.append(request)
        for each in list(live):
            choice = rng.random()  # type: ignore[attr-defined]
            if choice < 0.3 and each.generated < each.new_tokens:
                book.token(each)
            elif choice < 0.5:
                book.change_rank(each, each.ladder[-1])
                assert told.pop() == each.ladder[-1] == each.rank
            elif choice > 0.8:
                book.remove(each)
                live.remove(each)
                book.change_rank(each, 99)  # it has ended: nothing happens
                assert not told
        check(book, live)
    for each in live:
        book.remove(each)
    check(book, [])


def check(book: LoadBook, live: list[InFlight]) -> None:
    decoding = [each for each in live if each.generated]
    waiting = [each for each in live if not each.generated]
    of: dict[str | None, list[InFlight]] = {}
    for each in live:
        of.setdefault(each.version, []).append(each)
    assert (book.decoding, book.waiting) == (len(decoding), len(waiting))
    assert book.waiting_prompt_tokens == sum(each.prompt_tokens for each in waiting)
    assert book.context_tokens == sum(each.prompt_tokens + each.generated for each in decoding)
    assert book.adapters == len([version for version in of if version])
    levels = range(len(FULL))
    assert book.row_ranks.tolist() == [sum(each.ladder[level] for each in live) for level in levels]
    columns = [sum(max(each.ladder[level] for each in users) for users in of.values()) for level in levels]
    assert book.columns.tolist() == columns
    pairs = Counter((each.version, each.rank) for each in live)
    assert book.only_pair == (next(iter(pairs)) if len(pairs) == 1 else None)


def test_traffic_is_what_arrived_lately() -> None:
    book = LoadBook()
    for number in range(2000):  # two a second, of 30 tokens each
        request = InFlight(f"adapter {number % 3}", constant(4), 4, 10, 30)
        book.add(request, number / 2)
        book.remove(request)
    traffic = book.traffic(1000.0)
    assert traffic.new_tokens_per_s == pytest.approx(60, rel=0.15)
    assert traffic.prompt_tokens_per_s == pytest.approx(20, rel=0.15)
    assert traffic.requests_per_s == pytest.approx(2, rel=0.15)
    assert traffic.new_tokens == pytest.approx(30)
    np.testing.assert_allclose(traffic.ranks, 4.0, rtol=1e-3)
    later = book.traffic(1000.0 + TRAFFIC_S)
    assert later.new_tokens_per_s == pytest.approx(traffic.new_tokens_per_s / math.e)
