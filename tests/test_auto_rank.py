"""One price for all that is in flight: when it rises, when it falls, and whose rank follows it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from adapters.quality import Metric, QualityProfile
from service.core import Mode, StepReport
from service.http.generation.measurement import Measurement
from service.http.metrics import Metrics
from service.rank.auto_rank import AutoRank, Price
from service.rank.ladder import TOP, constant, kept_quality, ladder
from service.rank.load import InFlight
from service.rank.prospect import Ask, EngineSizes
from service.rank.rank_policy import RankDecision, RankFacts, RankReason
from service.slo import Slo
from tests.made_up_steps import known_model, true_seconds

SIZES = EngineSizes(max_running=64, max_batch_tokens=512, prefill_chunk_tokens=16)
RANKS = (1, 2, 4, 8, 16, 32, 64)
QUALITY = {rank: 1 - 0.3 * rank**-0.5 for rank in RANKS}
STEPS = ladder(RANKS, QUALITY)
NEW_TOKENS = 60


@dataclass
class Machine:
    """Requests of 60 tokens that generate side by side, each of an adapter of its own, on a machine whose steps are known."""

    now: float = 0.0
    told: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.auto_rank = AutoRank(known_model(), SIZES, clock=lambda: self.now)
        self.live: list[InFlight] = []

    def add(self, count: int, due_s: float | None, *, is_elastic: bool = True, rank: int | None = None) -> None:
        for _ in range(count):
            number = len(self.live)
            steps = STEPS if rank is None else constant(rank)
            told = self.told.setdefault(number, [])
            due_at = None if due_s is None else self.now + due_s
            change = told.append if is_elastic else None
            request = InFlight(f"v{number}", steps, steps[0], 40, NEW_TOKENS, due_at=due_at, change=change)
            self.auto_rank.book.add(request, self.now)
            self.auto_rank.book.token(request)
            self.live.append(request)

    def step(self, mode: Mode = Mode.MIXED) -> None:
        rows, ranks = len(self.live), sum(each.rank for each in self.live)
        report = StepReport(mode, 0, rows, 1.0, ranks, ranks, rows, 60 * rows)
        seconds = true_seconds(report)
        self.now += seconds
        for each in self.live:
            self.auto_rank.book.token(each)
        self.auto_rank.on_step(StepReport(mode, 0, rows, seconds, ranks, ranks, rows, 60 * rows))

    def run(self) -> None:
        """To the end of all."""
        for _ in range(NEW_TOKENS - 1):
            self.step()
        assert all(each.generated == NEW_TOKENS for each in self.live)


def test_with_time_enough_all_keep_the_full_rank() -> None:
    machine = Machine()
    machine.add(30, due_s=60.0)
    machine.run()
    assert machine.auto_rank.price.now == 0
    assert not any(machine.told.values())


def test_when_time_gets_short_the_ranks_fall_and_all_are_on_time() -> None:
    def seconds(rank: int) -> float:
        machine = Machine()
        machine.add(30, None, rank=rank)
        machine.run()
        return machine.now

    least, full = seconds(1), seconds(64)
    machine = Machine()
    machine.add(30, due_s=(1.3 * least + full) / 2.3)
    machine.run()
    assert machine.now <= (1.3 * least + full) / 2.3
    assert all(told and 1 < min(told) < 64 for told in machine.told.values())
    assert len({each.rank for each in machine.live}) == 1, "those of one curve have one rank"


def test_those_in_flight_make_room_for_who_comes_before_the_next_step() -> None:
    machine = Machine()
    machine.add(10, due_s=60.0)
    machine.step()
    assert {each.rank for each in machine.live} == {64}
    machine.add(30, due_s=2.3)
    machine.auto_rank.on_arrival()
    assert len({each.rank for each in machine.live}) == 1
    assert machine.live[0].rank < 64


def test_a_submission_makes_that_room() -> None:
    machine = Machine()
    machine.add(10, due_s=60.0)
    machine.step()
    decision = RankDecision(STEPS[0], RankReason.SLO, "latency", ladder=STEPS, is_elastic=True)
    for number in range(30):
        measurement = Measurement(
            machine.auto_rank, Metrics(), slo=Slo(latency_ms=3500), decision=decision, predicted=None, arrived_at=machine.now
        )
        with measurement.sequence(f"new{number}", Ask(40, NEW_TOKENS), lambda rank: None).in_flight():
            pass
    assert machine.live[0].rank < 64


def test_who_named_a_rank_keeps_it_and_has_the_others_make_room() -> None:
    machine = Machine()
    machine.add(2, due_s=2.3, rank=64, is_elastic=False)
    machine.add(28, None)
    machine.step()
    assert [each.rank for each in machine.live[:2]] == [64, 64]
    assert {each.rank for each in machine.live[2:]} == {min(each.rank for each in machine.live)} != {64}


def test_what_cannot_be_saved_costs_the_others_nothing() -> None:
    machine = Machine()
    machine.add(29, due_s=60.0)
    machine.add(1, due_s=0.1)
    machine.step()
    assert machine.auto_rank.price.now == 0


def test_the_price_is_not_raised_where_that_saves_nothing() -> None:
    """One adapter alone: its columns are nothing on this machine."""
    machine = Machine()
    machine.add(1, due_s=0.1)
    machine.step()
    assert machine.auto_rank.price.now == 0


def test_one_that_only_the_smallest_ranks_could_save_does_not_take_them_from_all() -> None:
    machine = Machine()
    machine.add(30, due_s=60.0)
    least_s = machine.auto_rank.predict("own", Ask(40, NEW_TOKENS), 0.0)
    assert least_s is not None
    machine.add(1, due_s=1.05 * least_s.at(STEPS[TOP], TOP).latency_ms / 1000)
    machine.step()
    assert machine.live[0].rank > 1
    quality = QUALITY[machine.live[0].rank] / QUALITY[64]
    assert 31 * quality > 28, "it is worth four answers at most, its own and IN_TIME"


def test_when_the_load_goes_the_ranks_rise_again() -> None:
    machine = Machine()
    machine.add(40, due_s=2.7)
    machine.step()
    assert machine.live[0].rank < 64
    for each in machine.live[1:]:
        machine.auto_rank.book.remove(each)
    del machine.live[1:]
    machine.live[0].due_at = machine.now + 60
    machine.step()
    assert machine.live[0].rank == 64


@pytest.mark.parametrize("ranks", [RANKS, range(1, 65)])
def test_what_a_price_leaves_of_the_quality_is_read_off_the_ladder(ranks: Sequence[int]) -> None:
    quality = {rank: 1 - 0.3 * rank**-0.5 for rank in ranks}
    steps = ladder(ranks, quality)
    assert kept_quality(steps) == pytest.approx([quality[rank] / quality[64] for rank in steps], abs=0.015)
    assert set(kept_quality(constant(4))) == {1.0}


def test_merged_weights_leave_every_rank_as_it_is() -> None:
    machine = Machine()
    machine.add(1, due_s=60.0)
    machine.auto_rank.price.now = 30
    machine.live[0].rank = 64
    machine.step(Mode.MERGED)
    assert not any(machine.told.values())


def test_the_highest_price_is_held_for_who_keeps_a_rank_and_falls_slowly() -> None:
    price = Price()
    price.move(20, at=1.0)
    assert (price.now, price.held) == (20, 20.0)
    price.move(0, at=3.0)
    assert price.now == 0
    assert 18.0 < price.held < 19.0
    price.move(5, at=100.0)
    assert (price.now, price.held) == (5, 5.0)


def test_the_ladder_of_an_adapter_is_within_the_policys_bounds() -> None:
    facts = RankFacts(RANKS, QualityProfile((Metric("m", True, QUALITY),), "made up"))
    assert facts.ladder(1, 64) == STEPS
    assert set(facts.ladder(4, 16)) == {4, 8, 16}
    assert facts.ladder(4, 16) is facts.ladder(4, 16)


def test_what_was_paid_in_a_burst_is_not_asked_of_one_who_comes_to_an_idle_server_later() -> None:
    machine = Machine()
    machine.auto_rank.price.move(30, at=0.0)
    machine.now = 60.0
    prediction = machine.auto_rank.predict("own", Ask(40, 60), 60.0)
    assert prediction is not None
    assert (prediction.price, prediction.held_price) == (0, 0)


@pytest.mark.parametrize("count", [1, 16, 64, 100])
def test_of_several_sequences_the_last_ones_times_are_predicted(count: int) -> None:
    auto_rank = AutoRank(known_model(), SIZES, clock=lambda: 0.0)
    siblings = [InFlight("own", constant(1), 1, 1, NEW_TOKENS) for _ in range(count - 1)]
    made = auto_rank.predict("own", Ask(40, NEW_TOKENS), 0.0, siblings=siblings)
    assert made is not None and made.in_flight == 0
    assert not auto_rank.book.requests and not auto_rank.book.row_ranks.any() and not auto_rank.book.adapters
    rows = min(count, SIZES.max_running)
    step_s = true_seconds(StepReport(Mode.MIXED, 0, rows, 1.0, 1, rows, 1, 70 * rows))
    rounds = 1 if count <= SIZES.max_running else 2
    assert made.at(1).latency_ms == pytest.approx(1000 * rounds * NEW_TOKENS * step_s, rel=0.25)
