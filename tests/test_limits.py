import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequest
from service.http.limits import (
    MAX_RETRY_AFTER_S,
    DrainRate,
    TokenBucket,
    body_time_s,
    time_limit_s,
    whole_seconds,
)


class ManualClock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


def test_a_bucket_lets_its_size_through_and_says_when_the_next_may_come() -> None:
    clock = ManualClock()
    bucket = TokenBucket(30, clock)
    assert [bucket.take() for _ in range(30)] == [0.0] * 30
    assert bucket.take() == pytest.approx(2.0)
    clock.pass_s(1.5)
    assert bucket.take() == pytest.approx(0.5)
    clock.pass_s(0.51)
    assert bucket.take() == 0


@given(per_minute=st.integers(1, 600), pauses=st.lists(st.floats(0, 20), max_size=200))
def test_a_bucket_never_lets_through_more_than_it_holds_and_gets(per_minute: int, pauses: list[float]) -> None:
    clock = ManualClock()
    bucket = TokenBucket(per_minute, clock)
    passed = 0
    for pause in pauses:
        clock.pass_s(pause)
        passed += bucket.take() == 0
    assert passed <= per_minute + sum(pauses) * per_minute / 60 + 1e-6


@given(per_minute=st.integers(1, 600), tries=st.integers(1, 50))
def test_whoever_comes_back_when_told_is_let_in(per_minute: int, tries: int) -> None:
    clock = ManualClock()
    bucket = TokenBucket(per_minute, clock)
    for _ in range(tries):
        while (wait := bucket.take()) == 0:
            pass
        clock.pass_s(whole_seconds(wait))
        assert bucket.take() == 0


def test_a_queue_is_said_to_have_room_when_it_has_drained() -> None:
    rate = DrainRate()
    assert rate.retry_after_s(running=4, waiting=100) == 1  # nothing has ended yet
    for _ in range(3):
        rate.ended(2.0)
    assert rate.retry_after_s(running=4, waiting=10) == 5  # four that take two seconds each: two a second
    assert rate.retry_after_s(running=4, waiting=10_000) == MAX_RETRY_AFTER_S
    assert rate.retry_after_s(running=0, waiting=0) == 2
    for _ in range(100):
        rate.ended(0.2)
    assert rate.retry_after_s(running=4, waiting=100) == 6  # it follows what happens now


@pytest.mark.parametrize(
    ("headers", "limit_s"),
    [
        ({}, 600),
        ({"x-request-timeout-ms": "1500"}, 1.5),
        ({"x-request-timeout-ms": "999999999"}, 600),
        ({"x-envoy-expected-rq-timeout-ms": "200"}, 0.2),
        ({"x-request-timeout-ms": "1500", "x-envoy-expected-rq-timeout-ms": "200"}, 0.2),
    ],
)
def test_the_shortest_time_limit_counts(headers: dict[str, str], limit_s: float) -> None:
    assert time_limit_s(headers, 600) == limit_s


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "soon", "²", "1" * 13])
def test_a_time_limit_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"x-request-timeout-ms: .* is not legal: whole milliseconds, at least 1"):
        time_limit_s({"x-request-timeout-ms": text}, 600)


def test_bytes_buy_a_body_time() -> None:
    assert body_time_s(0, 20, 1024) == 20
    assert body_time_s(10 * 1024, 20, 1024) == 30
