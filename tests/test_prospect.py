"""What the next steps are expected to take, beside what they take."""

import statistics
from typing import Any

import pytest

from loadtests.slo.results import curve
from loadtests.slo.simulator import SIZES, Machine, Simulation
from loadtests.slo.trace import CLASSES, Asked, lognormal_lengths
from service.core import Mode
from service.rank.ladder import LEVELS, constant
from service.rank.latency_model import LatencyModel
from service.rank.load import InFlight, LoadBook
from service.rank.prospect import Prospect
from service.rank.rank_policy import RankFacts
from tests.made_up_steps import known_model

LONG_AGO = 1e6
FACTS = RankFacts(tuple(range(1, 65)))


class Watched(Simulation):
    """One that notes, before its first step, when each is expected to end if nobody else comes."""

    expected_s: list[float] | None = None

    def _step(self, *args: Any) -> None:
        if self.expected_s is None:
            auto_rank = self.auto_rank
            prospect = Prospect(auto_rank.model, auto_rank.book, SIZES, Mode.MIXED, self.now + LONG_AGO)
            self.expected_s = prospect.seconds(prospect.work(prospect.ends[:, None]))[:, 0].tolist()
        super()._step(*args)


@pytest.mark.parametrize("rank", [1, 64])
@pytest.mark.parametrize("count", [1, 8, 60, 120])
def test_a_burst_is_expected_to_end_when_it_does(count: int, rank: int) -> None:
    """Beyond the engine's 64 places as well, where one begins when another ends."""
    ranks = tuple(range(1, 65))
    simulation = Watched(ranks, dict(curve(ranks)), machine=Machine(noise=0.0))
    lengths = lognormal_lengths(0, count)
    asked = [Asked(0.0, number % 32, str(number), tokens, CLASSES[0]) for number, tokens in enumerate(lengths)]
    took_s = [each.latency_ms / 1000 for each in simulation.play(asked, {"rank": rank}, simulation.token_ms())]
    expected_s = simulation.expected_s
    assert expected_s is not None
    assert max(expected_s) == pytest.approx(max(took_s), rel=0.15)
    assert statistics.fmean(expected_s) == pytest.approx(statistics.fmean(took_s), rel=0.15)


def expected_s(book: LoadBook, now: float) -> list[float]:
    prospect = Prospect(known_model(), book, SIZES, Mode.MIXED, now)
    return [float(each) for each in prospect.seconds(prospect.work(prospect.ends[:, None]))[:, 0]]


def test_what_came_lately_is_expected_to_go_on_coming() -> None:
    book = LoadBook()
    for number in range(20):
        request = InFlight(f"v{number}", constant(16), 16, 40, 30)
        book.add(request, now=0.1 * number)
        book.token(request)
    soon, later, calm = (expected_s(book, now) for now in (2.0, 4.0, LONG_AGO))
    assert all(a > b > c for a, b, c in zip(soon, later, calm, strict=True))


def test_who_waits_for_a_place_ends_after_those_who_have_one_and_the_others_no_later_for_it() -> None:
    book = LoadBook()
    for number in range(64):
        request = InFlight(f"v{number}", constant(4), 4, 40, 30)
        book.add(request, 0.0)
        book.token(request)
    before = expected_s(book, LONG_AGO)
    book.add(InFlight("own", constant(4), 4, 1, 30), 0.0)
    *others, last = expected_s(book, LONG_AGO)
    assert last > max(others)
    assert max(others) == pytest.approx(max(before), rel=0.1)


def dear_ranks() -> LatencyModel:
    """One that has seen that columns cost time, and rows by their ranks."""
    ranks = tuple(range(1, 65))
    return Simulation(ranks, dict(curve(ranks)), machine=Machine(noise=0.0)).auto_rank.model


@pytest.mark.parametrize("generating", [0, 12])
def test_what_is_read_at_one_price_is_what_is_read_at_all(generating: int) -> None:
    """Who sets the price asks for all of them, who chooses a rank for one at a time."""
    book = LoadBook()
    for number in range(20):
        request = InFlight(f"v{number % 7}", FACTS.ladder(1, 64), 64, 40, 30)
        book.add(request, 0.1 * number)
        if number < generating:
            book.token(request)
    prospect = Prospect(dear_ranks(), book, SIZES, Mode.MIXED, 2.0, prompt_tokens=40)
    at_each = [prospect.row_and_token_s(level) for level in range(LEVELS)]
    assert [row for row, _ in at_each] == pytest.approx(prospect.row_s.tolist(), rel=1e-12)
    assert [token for _, token in at_each] == pytest.approx(prospect.token_s.tolist(), rel=1e-12)
    assert len({row for row, _ in at_each}) > 1


def test_what_was_read_of_a_load_stays_when_the_load_changes() -> None:
    """A decision is made outside the book's lock."""
    book = LoadBook()
    book.add(InFlight("v", FACTS.ladder(1, 64), 64, 40, 30), 0.0)
    model = dear_ranks()
    first, second = (Prospect(model, book, SIZES, Mode.MIXED, 1.0) for _ in range(2))
    before = first.row_s.tolist(), first.token_s.tolist()
    for version in "vw":
        book.add(InFlight(version, FACTS.ladder(1, 64), 64, 40, 30), 1.0)
    assert (second.row_s.tolist(), second.token_s.tolist()) == before
