"""The latency policy over a machine whose steps are known exactly."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.quality import Metric, QualityProfile
from service.core import AdapterChoice
from service.errors import InvalidRequest, SloUnattainable
from service.rank.auto_rank import AutoRank
from service.rank.ladder import TOP, ladder
from service.rank.latency_model import LatencyModel
from service.rank.latency_policy import Prediction, best_rank
from service.rank.load import InFlight
from service.rank.policies import Policy, PolicyBook, PolicyKind, RankBounds, WhenUnattainable
from service.rank.prospect import Ask, EngineSizes
from service.rank.quality_curve import ENERGY_PRIOR, energy_prior, quality_by_rank
from service.rank.rank_policy import RankDecision, RankFacts, RankReason, RankWish, decide
from service.slo import NO_SLO, Slo
from tests.made_up_steps import known_model

SIZES = EngineSizes(max_running=64, max_batch_tokens=512, prefill_chunk_tokens=16)
RANKS = (1, 2, 4, 8, 16, 32, 64)
RISING = {rank: 1 - 0.3 * rank**-0.5 for rank in RANKS}
STEPS = ladder(RANKS, RISING)
ASK = Ask(40, 30, 30)
MODEL = known_model()

LOADS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 100), st.integers(1, 60), st.booleans()), max_size=40)
"""Requests in flight: number of the adapter, prompt, answer, whether it generates."""
ASKS = st.builds(Ask, st.integers(1, 300), st.integers(1, 100))
SLOS = st.builds(Slo, *[st.none() | st.floats(1, 1e4)] * 3)
QUALITIES = st.tuples(*[st.floats(0.1, 5)] * len(RANKS)).map(lambda values: dict(zip(RANKS, values, strict=True)))
Loads = list[tuple[int, int, int, bool]]
BUSY: Loads = [(number, 40, 60, True) for number in range(31)]


def loaded(load: Loads) -> AutoRank:
    auto_rank = AutoRank(MODEL, SIZES, clock=lambda: 0.0)
    for number, prompt, new, is_decoding in load:
        request = InFlight(f"v{number}", STEPS, STEPS[0], prompt, new)
        auto_rank.book.add(request, 0.0)
        if is_decoding:
            auto_rank.book.token(request)
    return auto_rank


def prediction(load: Loads = BUSY, ask: Ask = ASK, *, safety: float = 1.0, merged: frozenset[int] = frozenset()) -> Prediction:
    made = loaded(load).predict("own", ask, 0.0, {AdapterChoice("own", rank, 1.0) for rank in merged})
    assert made is not None
    return replace(made, safety=safety)


def best(made: Prediction, slo: Slo, quality: Mapping[int, float] = RISING, *, is_elastic: bool = True) -> int | None:
    choice = best_rank(made, slo, RANKS, ladder(RANKS, quality), quality, is_elastic=is_elastic)
    return None if choice is None else choice.rank


@settings(max_examples=100)
@given(LOADS, ASKS)
def test_no_predicted_time_falls_as_a_rank_rises_or_as_the_price_falls(load: Loads, ask: Ask) -> None:
    made = prediction(load, ask).mixed
    for times in ([made.at(3, rank) for rank in (0, *RANKS)], [made.at(level, STEPS[level]) for level in range(TOP, -1, -1)]):
        for kind in range(3):
            of_kind = [round(each[kind], 6) for each in times]
            assert of_kind == sorted(of_kind)


@settings(max_examples=100)
@given(LOADS, ASKS, SLOS, SLOS, QUALITIES, st.sets(st.sampled_from(RANKS)))
def test_a_looser_slo_never_gives_a_lower_quality(
    load: Loads, ask: Ask, one: Slo, other: Slo, quality: dict[int, float], merged: set[int]
) -> None:
    looser = Slo(*(None if a is None or b is None else max(a, b) for a, b in zip(each(one), each(other), strict=True)))
    made = prediction(load, ask, merged=frozenset(merged))
    tight, loose = best(made, one, quality), best(made, looser, quality)
    if tight is not None:
        assert loose is not None
        assert quality[loose] >= quality[tight]


def each(slo: Slo) -> tuple[float | None, float | None, float | None]:
    return slo.latency_ms, slo.ttft_ms, slo.itl_ms


@settings(max_examples=100)
@given(LOADS, ASKS, SLOS, st.floats(1, 3), QUALITIES)
def test_a_larger_safety_factor_never_gives_a_higher_quality(
    load: Loads, ask: Ask, slo: Slo, factor: float, quality: dict[int, float]
) -> None:
    exact, careful = (best(prediction(load, ask, safety=safety), slo, quality) for safety in (1.0, factor))
    if careful is not None:
        assert exact is not None
        assert quality[careful] <= quality[exact]


def latency_ms(made: Prediction, rank: int) -> float:
    """If the others have the ranks of the price at which it has this one."""
    return made.at(rank, STEPS.index(rank)).latency_ms


def test_a_tight_slo_under_load_takes_a_lower_rank() -> None:
    made = prediction()
    full, least = latency_ms(made, 64), latency_ms(made, 1)
    assert full > 1.2 * least
    assert best(made, Slo(full + 1)) == 64
    middle = best(made, Slo((full + least) / 2))
    assert middle is not None and 1 < middle < 64
    assert best(made, Slo(least - 10)) is None


def test_where_rank_does_not_move_latency_the_full_rank_is_given() -> None:
    """One adapter alone: 64 columns are nothing on this machine."""
    short = Slo(0.9 * prediction([]).at(1, TOP).latency_ms)
    decision = chosen(short, prediction([]))
    assert (decision.rank, decision.reason) == (64, RankReason.DEFAULT), "nothing to choose by, and no promise"


def test_the_price_of_those_in_flight_is_paid_and_one_that_keeps_its_rank_pays_the_one_held() -> None:
    made = replace(prediction(), price=20, held_price=30)
    assert best(made, Slo(1e6)) == STEPS[20] < 64
    assert best(made, Slo(1e6), is_elastic=False) == STEPS[30] < STEPS[20]


def test_of_equal_quality_what_is_merged_goes_first_and_then_the_smaller_rank() -> None:
    equal = {rank: min(rank, 8) / 8 for rank in RANKS}
    assert best(prediction(), Slo(1e6), equal) == 8
    assert best(prediction([], merged=frozenset({32})), Slo(1e6), equal) == 32
    assert best(prediction([], merged=frozenset({4})), Slo(1e6)) == 64


def facts(quality: QualityProfile | None = None) -> RankFacts:
    return RankFacts(RANKS, quality or QualityProfile((Metric("m", True, RISING),), "made up"))


def book(**policy: object) -> PolicyBook:
    return PolicyBook({"latency": Policy(PolicyKind.LATENCY, **policy), "max": Policy(PolicyKind.MAX)}, "max")  # type: ignore[arg-type]


def chosen(
    slo: Slo, made: Prediction | None, *, wish: RankWish = None, policy: str | None = None, **options: object
) -> RankDecision:
    return decide(wish, policy, facts(), book(**options), slo=slo, prediction=made)


def test_an_slo_chooses_the_policy_and_the_decision_says_what_is_predicted() -> None:
    made = prediction()
    decision = chosen(Slo(1e6), made)
    assert decision == RankDecision(64, RankReason.SLO, "latency", Slo(1e6), made.at(64), STEPS, is_elastic=True)
    assert chosen(Slo(1e6), made, wish="auto") == decision
    assert chosen(NO_SLO, made, policy="latency", latency_slo_ms=1e6) == decision
    assert chosen(NO_SLO, made).policy == "max"
    assert not chosen(Slo(1e6), made, elastic=False).is_elastic


def test_beside_a_rank_an_slo_is_only_measured() -> None:
    decision = chosen(Slo(1e6), prediction(), wish=4)
    assert (decision.rank, decision.reason, decision.slo) == (4, RankReason.REQUESTED, Slo(1e6))
    assert not decision.is_elastic and set(decision.ladder) == {4}
    with pytest.raises(InvalidRequest, match="'max' does not choose by latency and contradicts latency_slo_ms 100"):
        chosen(Slo(100), prediction(), policy="max")


@pytest.mark.parametrize("made", [None, prediction()])
def test_with_nothing_to_choose_by_the_full_rank_serves(made: Prediction | None) -> None:
    decision = chosen(NO_SLO if made else Slo(5), made, policy="latency")
    assert (decision.rank, decision.reason) == (64, RankReason.DEFAULT)


@given(st.integers(1, 70), st.none() | st.integers(0, 70), st.integers(1, 70), st.none() | st.integers(0, 70), SLOS)
def test_floor_and_ceiling_hold_for_every_rank_that_it_may_get(
    floor: int, extra: int | None, key_floor: int, key_extra: int | None, slo: Slo
) -> None:
    ceiling = None if extra is None else floor + extra
    bounds = RankBounds(key_floor, None if key_extra is None else key_floor + key_extra)
    policies = book(floor=floor, ceiling=ceiling)
    try:
        decision = decide("auto", "latency", facts(), policies, bounds, slo=slo, prediction=prediction())
    except (InvalidRequest, SloUnattainable):
        return
    both = [rank for rank in bounds.of(RANKS) if floor <= rank <= (ceiling or 64)]
    for rank in {decision.rank, *decision.ladder}:
        assert rank in bounds.of(RANKS)
        assert rank in both or not both


def test_at_the_floor_it_serves_or_refuses() -> None:
    made = prediction()
    short = Slo(made.at(4, TOP).latency_ms - 1)
    served = chosen(short, made, floor=4)
    assert (served.rank, served.reason) == (4, RankReason.FLOOR)
    assert not served.is_elastic and set(served.ladder) == {4}, "what the reason says stays true"
    with pytest.raises(SloUnattainable, match="at rank 4, beside the 31 requests in flight, the prediction is") as refused:
        chosen(short, made, floor=4, when_unattainable=WhenUnattainable.REFUSE)
    assert refused.value.attainable == made.at(4, TOP)
    assert not refused.value.is_for_good


def test_what_an_idle_server_might_miss_is_tried() -> None:
    """Refusing it would leave the safety factor nothing to learn from."""
    idle = prediction([], safety=3.0)
    slo = Slo(idle.at(1).latency_ms)
    assert chosen(slo, idle, when_unattainable=WhenUnattainable.REFUSE).rank in RANKS


@settings(max_examples=100)
@given(LOADS, ASKS, SLOS, st.booleans(), st.integers(0, TOP), st.floats(1, 1.5))
def test_by_slo_means_predicted_to_be_in_time(
    load: Loads, ask: Ask, slo: Slo, elastic: bool, price: int, safety: float
) -> None:
    made = replace(prediction(load, ask, safety=safety), price=price, held_price=price)
    try:
        decision = chosen(slo, made, elastic=elastic)
    except SloUnattainable:
        return
    if not slo.is_empty:
        assert decision.predicted is not None
        assert (decision.reason is RankReason.SLO) == slo.is_met_by(decision.predicted)


@pytest.mark.parametrize("slo", [Slo(latency_ms=1), Slo(ttft_ms=1), Slo(itl_ms=1)])
@pytest.mark.parametrize("wish", [None, 4])
def test_the_impossible_is_refused_with_what_is_attainable(slo: Slo, wish: RankWish) -> None:
    made = prediction([])
    with pytest.raises(SloUnattainable, match="on an idle server") as refused:
        chosen(slo, made, wish=wish)
    assert refused.value.is_for_good
    assert chosen(Slo(*(2 * ms for ms in refused.value.attainable[::-1])), made, wish=wish).rank in RANKS


def test_an_answer_that_may_be_short_is_not_impossible() -> None:
    slo = Slo(150)
    assert chosen(slo, prediction([], Ask(10, 100, least_tokens=1))).rank in RANKS
    with pytest.raises(SloUnattainable):
        chosen(slo, prediction([], Ask(10, 100, least_tokens=100)))


def test_a_queue_makes_the_first_token_later() -> None:
    free = prediction(BUSY[:8]).at(1)
    full = prediction([(number % 8, 40, 60, number < 64) for number in range(84)]).at(1)
    assert full.ttft_ms > 3 * free.ttft_ms


def test_nothing_is_predicted_before_the_model_is_ready() -> None:
    assert AutoRank(LatencyModel(), SIZES).predict("own", Ask(1, 1), 0.0) is None


def test_quality_between_measured_ranks_is_interpolated() -> None:
    profile = QualityProfile((Metric("loss", higher_is_better=False, values={1: 3.0, 4: 2.0, 16: 1.0}),), "made up")
    known = quality_by_rank((1, 2, 4, 8, 16, 32), profile)
    assert known == {1: -3.0, 2: -2.5, 4: -2.0, 8: -1.5, 16: -1.0, 32: -1.0}
    without = quality_by_rank((2, 4, 8), None)
    assert without[8] > without[4] > without[2]


def test_an_adapter_without_measurements_goes_by_its_energy() -> None:
    prior = energy_prior((0.5, 0.8, 0.9, 1.0), (1, 2, 4))
    assert prior.source == ENERGY_PRIOR
    assert RankFacts((1, 2, 4), prior=prior).quality_by_rank == {1: 0.5, 2: 0.8, 4: 1.0}
    measured = QualityProfile((Metric("m", True, {1: 7.0}),), "made up")
    assert RankFacts((1, 2, 4), measured, prior=prior).quality_by_rank[4] == 7.0
