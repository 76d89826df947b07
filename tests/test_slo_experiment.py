"""The parts of the experiment that are arithmetic."""

import itertools
import random
import statistics

import pytest

from loadtests.slo.client import Wish
from loadtests.slo.plan import KEPT
from loadtests.slo.results import Outcome, Summary, curve, oracle, recovery_s, spread_of, summary
from loadtests.slo.simulator import Simulation
from loadtests.slo.trace import Arrivals, Asked, arrival_times, lognormal_lengths, trace


@pytest.mark.parametrize(("arrivals", "variation"), [(Arrivals.POISSON, 1.0), (Arrivals.GAMMA, 3.0)])
def test_gaps_have_the_rate_and_the_variation(arrivals: Arrivals, variation: float) -> None:
    times = list(arrival_times(random.Random(0), arrivals, 5.0, 4000.0))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.1)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(variation, rel=0.1)
    assert times == sorted(times)


def test_a_step_of_load_is_in_the_middle_third() -> None:
    times = list(arrival_times(random.Random(0), Arrivals.STEP, 10.0, 900.0))
    thirds = [sum(300 * third <= each < 300 * (third + 1) for each in times) / 300 for third in range(3)]
    assert thirds == pytest.approx([5, 15, 5], rel=0.1)


def test_a_trace_is_the_same_for_the_same_seed_and_follows_zipf() -> None:
    def made(seed: int) -> list[object]:
        return list(
            trace(seed, arrivals=Arrivals.POISSON, rate_per_s=20, seconds=200, adapters=8, lengths=[("a", 3), ("b", 9)])
        )

    assert made(1) == made(1) != made(2)
    asked = trace(1, arrivals=Arrivals.POISSON, rate_per_s=20, seconds=200, adapters=8, lengths=[("a", 3), ("b", 9)])
    first, second = (sum(each.adapter == number for each in asked) for number in (0, 1))
    assert first / second == pytest.approx(2, rel=0.15)
    assert {(each.prompt, each.new_tokens) for each in asked} == {("a", 3), ("b", 9)}
    assert {each.deadline.name for each in asked} == {"interactive", "standard"}


def test_lengths_are_lognormal_within_bounds() -> None:
    lengths = lognormal_lengths(0, 2000)
    assert statistics.median(lengths) == pytest.approx(28, abs=1)
    assert min(lengths) >= 2 and max(lengths) <= 96


FAST, SLOW = Outcome(64, 1.0, 90, 100), Outcome(64, 1.0, 110, 100)
LOW, LATE = Outcome(4, 0.8, 50, 100), Outcome(4, 0.8, 120, 100)
REFUSED = Outcome(None, 0.0, 1, 100)


def test_a_summary_counts_quality_only_in_time() -> None:
    found = summary([FAST, SLOW, LOW, REFUSED], seconds=2.0, full_rank=64)
    assert (found.requests, found.met, found.goodput_per_s, found.full_rank) == (4, 0.5, 1.0, 0.5)
    assert found.quality == pytest.approx(0.9)
    assert found.effective == pytest.approx(0.45)
    assert summary([SLOW], 1.0, 64).quality == 0.0


def test_the_oracle_takes_the_best_that_met_its_deadline() -> None:
    assert oracle([[FAST, SLOW, SLOW], [LOW, LOW, LATE]]) == [FAST, LOW, SLOW]


def test_the_claimed_quality_rises_to_one() -> None:
    claimed = list(curve(range(1, 65)).values())
    assert claimed == sorted(claimed)
    assert claimed[0] == pytest.approx(0.7)
    assert claimed[-1] == 1.0


def test_the_spread_is_mean_and_extremes() -> None:
    assert spread_of([1.0, 2.0, 6.0]) == (3.0, 1.0, 6.0)


def simulated(asked: list[Asked], wish: Wish) -> Summary:
    ranks = tuple(range(1, 65))
    simulation = Simulation(ranks, dict(curve(ranks)))
    outcomes = simulation.play(asked, wish, simulation.token_ms())
    assert all(each.server_says_met == each.is_met for each in outcomes), "the server's verdict is the client's"
    return summary(outcomes, 40, 64)


def requests(rate_per_s: float, arrivals: Arrivals = Arrivals.POISSON) -> list[Asked]:
    lengths = [("p", tokens) for tokens in lognormal_lengths(0, 100)]
    return trace(0, arrivals=arrivals, rate_per_s=rate_per_s, seconds=40, adapters=32, lengths=lengths)


@pytest.mark.parametrize("policy", ["latency", KEPT])
def test_in_simulation_at_low_load_the_full_rank_serves(policy: str) -> None:
    found = simulated(requests(2.0), {"rank": "auto", "rank_policy": policy})
    assert found.full_rank >= 0.99
    assert found.met == 1.0


def test_in_simulation_where_the_full_rank_is_late_auto_is_on_time_at_a_better_quality_than_a_fixed_rank() -> None:
    asked = requests(10.0)
    full, fixed, auto = (simulated(asked, {"rank": rank}) for rank in (64, 16, "auto"))
    assert full.met < 0.7
    assert auto.met >= 0.99
    assert auto.quality > fixed.quality
    assert auto.changed > 0


def test_in_simulation_elastic_ranks_are_ahead_of_every_fixed_one_in_bursts() -> None:
    asked = requests(6.0, Arrivals.GAMMA)
    full, middle, low, auto = (simulated(asked, {"rank": rank}) for rank in (64, 16, 4, "auto"))
    assert full.met < 0.9
    assert auto.effective > max(full.effective, middle.effective, low.effective)
    assert auto.met >= middle.met


def test_the_time_after_a_step_of_load_is_that_of_the_last_who_were_late() -> None:
    def at(moment: float, *, is_met: bool) -> Outcome:
        return Outcome(64, 1.0, 90 if is_met else 110, 100, at_s=moment)

    late = [
        at(10.2, is_met=False),
        at(11.0, is_met=True),
        at(11.5, is_met=False),
        at(12.5, is_met=True),
        at(20.1, is_met=False),
    ]
    assert recovery_s(late, 10.0, 20.0) == 2.5
    assert recovery_s(late[1:2], 10.0, 20.0) == 0.0
    assert recovery_s(late[:1], 10.0, 20.0) is None
