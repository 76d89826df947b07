"""The latency policy over a machine whose steps are known exactly."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.quality import Metric, QualityProfile
from service.core import Mode
from service.errors import InvalidRequest, SloUnattainable
from service.rank.forecast import Ask, EngineSizes, Forecast, alike, forecast
from service.rank.latency_model import LatencyModel
from service.rank.latency_policy import Outlook, best_rank
from service.rank.load import Load, Traffic
from service.rank.policies import Policy, PolicyBook, PolicyKind, RankBounds, WhenUnattainable
from service.rank.quality_curve import ENERGY_PRIOR, energy_prior, quality_by_rank
from service.rank.rank_policy import RankDecision, RankFacts, RankReason, RankWish, decide
from service.slo import NO_SLO, Slo, Times
from tests.made_up_steps import known_model

SIZES = EngineSizes(max_running=64, max_batch_tokens=512, prefill_chunk_tokens=16)
RANKS = (1, 2, 4, 8, 16, 32, 64)
RISING = {rank: float(rank) for rank in RANKS}
EXACT = Times(1.0, 1.0, 1.0)
MODEL = known_model()
ASK = Ask(40, 30, 30)
BUSY = Load(
    decoding=31,
    context_tokens=2000,
    remaining_tokens=600,
    columns=2000,
    row_ranks=2000,
    adapters=31,
    traffic=Traffic(700.0, 900.0, 24),
)

LOADS = st.builds(
    lambda decoding, waiting, prompt, context, columns, own, limits, traffic: Load(
        decoding,
        waiting,
        prompt * waiting,
        context * decoding,
        20 * (decoding + waiting),
        max(columns, own) if decoding + waiting else 0,
        columns if decoding + waiting else 0,
        min(8, decoding + waiting),
        own if decoding + waiting else 0,
        step_limits_s=tuple(limits),
        traffic=traffic,
    ),
    st.integers(0, 80),
    st.integers(0, 20),
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(0, 2000),
    st.sampled_from([0, 1, 8, 64]),
    st.lists(st.floats(0.001, 1), max_size=3),
    st.builds(Traffic, st.floats(0, 2000), st.floats(0, 2000), st.integers(0, 32)),
)
ASKS = st.builds(Ask, st.integers(1, 300), st.integers(1, 100))
SLOS = st.builds(Slo, *[st.none() | st.floats(1, 1e4)] * 3)
QUALITIES = st.tuples(*[st.floats(-5, 5)] * len(RANKS)).map(lambda values: dict(zip(RANKS, values, strict=True)))


def outlook(load: Load = BUSY, ask: Ask = ASK, margins: Times = EXACT, merged: frozenset[int] = frozenset()) -> Outlook:
    made = forecast(MODEL, ask, load, SIZES, Mode.MIXED)
    assert made is not None
    return Outlook(
        made,
        margins,
        alike=lambda: alike(MODEL, load, load.context_tokens + 50.0, Mode.MIXED),
        idle=lambda: forecast(MODEL, ask, Load(), SIZES, Mode.MIXED),
        merged=forecast(MODEL, ask, load, SIZES, Mode.MERGED) if merged else None,
        merged_ranks=merged,
    ).with_others_following()


@settings(max_examples=100)
@given(LOADS, ASKS)
def test_no_predicted_time_falls_as_the_rank_rises(load: Load, ask: Ask) -> None:
    made = outlook(load, ask)
    times = [made.at(rank) for rank in (0, *RANKS)]
    for kind in range(3):
        of_kind = [each[kind] for each in times]
        assert of_kind == sorted(of_kind)


@settings(max_examples=100)
@given(LOADS, ASKS, SLOS, SLOS, QUALITIES, st.sets(st.sampled_from(RANKS)))
def test_a_looser_slo_never_gives_a_lower_quality(
    load: Load, ask: Ask, one: Slo, other: Slo, quality: dict[int, float], merged: set[int]
) -> None:
    looser = Slo(*(None if a is None or b is None else max(a, b) for a, b in zip(each(one), each(other), strict=True)))
    made = outlook(load, ask, merged=frozenset(merged))
    tight, loose = best_rank(made, one, RANKS, quality), best_rank(made, looser, RANKS, quality)
    if tight is not None:
        assert loose is not None
        assert quality[loose] >= quality[tight]


def each(slo: Slo) -> tuple[float | None, float | None, float | None]:
    return slo.latency_ms, slo.ttft_ms, slo.itl_ms


@settings(max_examples=100)
@given(LOADS, ASKS, SLOS, st.floats(1, 3), QUALITIES)
def test_a_larger_margin_never_gives_a_higher_quality(
    load: Load, ask: Ask, slo: Slo, factor: float, quality: dict[int, float]
) -> None:
    exact = best_rank(outlook(load, ask), slo, RANKS, quality)
    careful = best_rank(outlook(load, ask, Times(factor, factor, factor)), slo, RANKS, quality)
    if careful is not None:
        assert exact is not None
        assert quality[careful] <= quality[exact]


@settings(max_examples=100)
@given(LOADS, ASKS, SLOS, QUALITIES)
def test_what_is_chosen_meets_the_slo_unless_rank_is_free(load: Load, ask: Ask, slo: Slo, quality: dict[int, float]) -> None:
    made = outlook(load, ask)
    rank = best_rank(made, slo, RANKS, quality)
    gained = [1 - low / high if high else 0 for low, high in zip(made.at(1), made.at(64), strict=True)]
    if max(gained) <= 0.019:
        assert rank is not None and quality[rank] == max(quality.values())
    elif max(gained) > 0.02:
        assert rank is None or slo.is_met_by(made.at(rank))


def test_a_tight_slo_under_load_takes_a_lower_rank() -> None:
    made = outlook()
    full, least = made.at(64).latency_ms, made.at(1).latency_ms
    assert full > 1.02 * least
    assert best_rank(made, Slo(full + 1), RANKS, RISING) == 64
    middle = best_rank(made, Slo((full + least) / 2), RANKS, RISING)
    assert middle is not None and 1 < middle < 64
    assert best_rank(made, Slo(least - 1), RANKS, RISING) is None


def test_where_rank_does_not_move_latency_the_full_rank_is_given() -> None:
    """One adapter alone: 64 columns are nothing on this machine."""
    assert best_rank(outlook(Load()), Slo(1.0), RANKS, RISING) == 64


def test_the_objectives_of_others_are_kept_while_they_can_be() -> None:
    made = outlook()
    between = (made.forecast.step_s(8) + made.forecast.step_s(16)) / 2
    assert best_rank(outlook(replace(BUSY, step_limits_s=(between,))), Slo(1e6), RANKS, RISING) == 8
    hopeless = made.forecast.step_s(1) / 2
    assert best_rank(outlook(replace(BUSY, step_limits_s=(hopeless,))), Slo(1e6), RANKS, RISING) == 64


def test_of_equal_quality_what_is_merged_goes_first_and_then_the_smaller_rank() -> None:
    equal = {rank: min(rank, 8) for rank in RANKS}
    idle = Load()
    # Rank must move latency for the smaller one to be better: on this machine it does only beside other rows.
    assert best_rank(outlook(BUSY), Slo(1e6), RANKS, equal) == 8
    assert best_rank(outlook(idle, merged=frozenset({32})), Slo(1e6), RANKS, equal) == 32
    assert best_rank(outlook(idle, merged=frozenset({4})), Slo(1e6), RANKS, RISING) == 64


def facts(quality: QualityProfile | None = None) -> RankFacts:
    return RankFacts(RANKS, quality)


def book(**policy: object) -> PolicyBook:
    return PolicyBook({"latency": Policy(PolicyKind.LATENCY, **policy), "max": Policy(PolicyKind.MAX)}, "max")  # type: ignore[arg-type]


def chosen(
    slo: Slo, made: Outlook | None, *, wish: RankWish = None, policy: str | None = None, **options: object
) -> RankDecision:
    return decide(wish, policy, facts(), book(**options), slo=slo, outlook=made)


def test_an_slo_chooses_the_policy_and_the_decision_says_what_is_predicted() -> None:
    made = outlook()
    decision = chosen(Slo(1e6), made)
    assert decision == RankDecision(64, RankReason.SLO, "latency", Slo(1e6), made.at(64))
    assert chosen(Slo(1e6), made, wish="auto") == decision
    assert chosen(NO_SLO, made, policy="latency", latency_slo_ms=1e6) == decision
    assert chosen(NO_SLO, made).policy == "max"


def test_beside_a_rank_an_slo_is_only_measured() -> None:
    decision = chosen(Slo(1e6), outlook(), wish=4)
    assert (decision.rank, decision.reason, decision.slo) == (4, RankReason.REQUESTED, Slo(1e6))
    with pytest.raises(InvalidRequest, match="'max' does not choose by latency and contradicts latency_slo_ms 100"):
        chosen(Slo(100), outlook(), policy="max")


@pytest.mark.parametrize("made", [None, outlook()])
def test_with_nothing_to_choose_by_the_full_rank_serves(made: Outlook | None) -> None:
    decision = chosen(NO_SLO if made else Slo(5), made, policy="latency")
    assert (decision.rank, decision.reason) == (64, RankReason.DEFAULT)


@given(st.integers(1, 70), st.none() | st.integers(0, 70), st.integers(1, 70), st.none() | st.integers(0, 70), SLOS)
def test_floor_and_ceiling_hold(floor: int, extra: int | None, key_floor: int, key_extra: int | None, slo: Slo) -> None:
    ceiling = None if extra is None else floor + extra
    bounds = RankBounds(key_floor, None if key_extra is None else key_floor + key_extra)
    try:
        decision = decide("auto", "latency", facts(), book(floor=floor, ceiling=ceiling), bounds, slo=slo, outlook=outlook())
    except (InvalidRequest, SloUnattainable):
        return
    assert decision.rank in bounds.of(RANKS)
    both = [rank for rank in bounds.of(RANKS) if floor <= rank <= (ceiling or 64)]
    assert decision.rank in both or not both


def test_at_the_floor_it_serves_or_refuses() -> None:
    made = outlook()
    short = Slo(made.at(4).latency_ms - 1)
    served = chosen(short, made, floor=4)
    assert (served.rank, served.reason) == (4, RankReason.FLOOR)
    with pytest.raises(SloUnattainable, match="at rank 4, beside the 31 requests in flight, the prediction is") as refused:
        chosen(short, made, floor=4, when_unattainable=WhenUnattainable.REFUSE)
    assert refused.value.attainable == made.safe_at(4)
    assert not refused.value.is_for_good


def test_what_an_idle_server_might_miss_is_tried() -> None:
    """Refusing it would leave the margins nothing to learn from."""
    idle = outlook(Load(), margins=Times(3.0, 3.0, 3.0))
    slo = Slo(idle.at(1).latency_ms)
    assert chosen(slo, idle, when_unattainable=WhenUnattainable.REFUSE).rank in RANKS


@pytest.mark.parametrize("slo", [Slo(latency_ms=1), Slo(ttft_ms=1), Slo(itl_ms=1)])
@pytest.mark.parametrize("wish", [None, 4])
def test_the_impossible_is_refused_with_what_is_attainable(slo: Slo, wish: RankWish) -> None:
    made = outlook(Load())
    with pytest.raises(SloUnattainable, match="on an idle server") as refused:
        chosen(slo, made, wish=wish)
    assert refused.value.is_for_good
    assert chosen(Slo(*(2 * ms for ms in refused.value.attainable[::-1])), made, wish=wish).rank in RANKS


def test_an_answer_that_may_be_short_is_not_impossible() -> None:
    slo = Slo(150)
    assert chosen(slo, outlook(Load(), Ask(10, 100, least_tokens=1))).rank in RANKS
    with pytest.raises(SloUnattainable):
        chosen(slo, outlook(Load(), Ask(10, 100, least_tokens=100)))


def test_a_queue_makes_the_first_token_later() -> None:
    free = outlook(Load(decoding=8, remaining_tokens=160, context_tokens=400)).at(1)
    full = outlook(Load(decoding=64, waiting=20, waiting_prompt_tokens=800, remaining_tokens=1600, context_tokens=3000)).at(1)
    assert full.ttft_ms > 3 * free.ttft_ms


def test_nothing_is_forecast_before_the_model_is_ready() -> None:
    made: Forecast | None = forecast(LatencyModel(), Ask(1, 1), Load(), SIZES, Mode.BASE)
    assert made is None


def test_quality_between_measured_ranks_is_interpolated() -> None:
    profile = QualityProfile((Metric("loss", higher_is_better=False, values={1: 3.0, 4: 2.0, 16: 1.0}),), "made up")
    known = quality_by_rank((1, 2, 4, 8, 16, 32), profile)
    assert known == {1: -3.0, 2: -2.5, 4: -2.0, 8: -1.5, 16: -1.0, 32: -1.0}
    assert quality_by_rank((2, 4), None) == {2: 2.0, 4: 4.0}


def test_an_adapter_without_measurements_goes_by_its_energy() -> None:
    prior = energy_prior((0.5, 0.8, 0.9, 1.0), (1, 2, 4))
    assert prior.source == ENERGY_PRIOR
    assert RankFacts((1, 2, 4), prior=prior).quality_by_rank == {1: 0.5, 2: 0.8, 4: 1.0}
    measured = QualityProfile((Metric("m", True, {1: 7.0}),), "made up")
    assert RankFacts((1, 2, 4), measured, prior=prior).quality_by_rank[4] == 7.0
