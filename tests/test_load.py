import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.rank.load import NO_TRAFFIC, TRAFFIC_S, InFlight, Load, LoadBook

REQUESTS = st.lists(
    st.tuples(st.sampled_from([None, "a", "b"]), st.sampled_from([0, 1, 4, 8]), st.integers(1, 50), st.integers(1, 20)),
    max_size=12,
)


@settings(max_examples=60)
@given(REQUESTS, st.randoms(use_true_random=False))
def test_the_sums_are_those_of_the_requests_in_flight(made: list[tuple[str | None, int, int, int]], rng: object) -> None:
    book = LoadBook()
    live: list[InFlight] = []
    for version, rank, prompt, new in made:
        request = InFlight(version, rank if version else 0, prompt, new)
        book.add(request, 0.0)
        live.append(request)
        for each in list(live):
            choice = rng.random()  # type: ignore[attr-defined]
            if choice < 0.3 and each.generated < each.new_tokens:
                book.token(each)
            elif choice > 0.8:
                book.remove(each)
                live.remove(each)
        check(book, live)
    for each in live:
        book.remove(each)
    assert replace(book.view("a", 0.0), traffic=NO_TRAFFIC) == Load()


def check(book: LoadBook, live: list[InFlight]) -> None:
    decoding = [each for each in live if each.generated]
    waiting = [each for each in live if not each.generated]
    ranks: dict[str | None, Counter[int]] = {}
    for each in live:
        ranks.setdefault(each.version, Counter())[each.rank] += 1
    own = ranks.get("a")
    assert replace(book.view("a", 0.0), traffic=NO_TRAFFIC) == Load(
        decoding=len(decoding),
        waiting=len(waiting),
        waiting_prompt_tokens=sum(each.prompt_tokens for each in waiting),
        context_tokens=sum(each.prompt_tokens + each.generated for each in decoding),
        remaining_tokens=sum(each.new_tokens - each.generated for each in live),
        columns=sum(max(each) for each in ranks.values()),
        row_ranks=sum(each.rank for each in live),
        adapters=len([version for version in ranks if version]),
        own_rank=max(own) if own else 0,
        only_rank=next(iter(own)) if own and len(ranks) == len(own) == 1 else None,
    )


def test_objectives_bound_the_steps_of_others() -> None:
    book = LoadBook()
    due = InFlight("a", 4, 10, 5, due_at=101.0)
    steady = InFlight("a", 4, 10, 5, due_at=120.0, gap_s=0.05)
    free = InFlight("a", 4, 10, 5)
    for request in (due, steady, free):
        book.add(request, 0.0)
    assert sorted(book.view("b", 100.0).step_limits_s) == [0.05, 0.2]
    for _ in range(4):
        book.token(due)
    assert sorted(book.view("b", 100.0).step_limits_s) == [0.05, 1.0]
    book.remove(due)
    assert book.view("b", 100.0).step_limits_s == (0.05,)


def test_traffic_is_what_arrived_lately() -> None:
    book = LoadBook()
    for number in range(2000):  # two a second, of 30 tokens each
        request = InFlight(f"adapter {number % 3}", 4, 10, 30)
        book.add(request, number / 2)
        book.remove(request)
    traffic = book.view(None, 1000.0).traffic
    assert traffic.new_tokens_per_s == pytest.approx(60, rel=0.06)
    assert traffic.prompt_tokens_per_s == pytest.approx(20, rel=0.06)
    assert traffic.adapters == 3
    later = book.view(None, 1000.0 + TRAFFIC_S).traffic
    assert later.new_tokens_per_s == pytest.approx(traffic.new_tokens_per_s / math.e)
