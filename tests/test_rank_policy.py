from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import IllegalRank
from adapters.quality import Metric, QualityProfile
from service.errors import InvalidRequest
from service.rank.policies import FIELDS_OF, Policy, PolicyBook, PolicyKind, RankBounds
from service.rank.rank_policy import RankDecision, RankFacts, RankReason, RankWish, decide


def made(kind: PolicyKind, **values: Any) -> Policy:
    """A policy with those of some values that its kind looks at."""
    return Policy(kind, **{name: value for name, value in values.items() if name in FIELDS_OF[kind]})


RANK_LISTS = st.lists(st.integers(1, 64), min_size=1, max_size=10, unique=True).map(sorted)
POLICIES = st.builds(
    lambda kind, rank, tolerance, share, floor, extra: made(
        kind, rank=rank, tolerance=tolerance, share=share, floor=floor, ceiling=None if extra is None else floor + extra
    ),
    st.sampled_from(PolicyKind),
    st.integers(1, 80),
    st.floats(0, 0.99),
    st.floats(0.001, 2),
    st.integers(1, 40),
    st.none() | st.integers(0, 60),
)


@st.composite
def facts(draw: st.DrawFn) -> RankFacts:
    ranks = draw(RANK_LISTS)
    measured = draw(st.lists(st.sampled_from(ranks), unique=True))
    values = {rank: draw(st.floats(-100, 100)) for rank in measured}
    profile = QualityProfile((Metric("m", draw(st.booleans()), values),), "made up") if values else None
    return RankFacts(tuple(ranks), profile, {rank: 100 * rank for rank in ranks}, draw(st.integers(1, 10_000)))


def book(policy: Policy) -> PolicyBook:
    return PolicyBook({"p": policy, "max": Policy(PolicyKind.MAX)}, "p")


def profile(*, higher_is_better: bool = True, **values: float) -> QualityProfile:
    by_rank = {int(name.removeprefix("r")): value for name, value in values.items()}
    return QualityProfile((Metric("m", higher_is_better, by_rank),), "made up")


@given(facts(), POLICIES)
def test_every_policy_gives_a_legal_rank_within_its_bounds_where_there_is_one(known: RankFacts, policy: Policy) -> None:
    rank = decide("auto", "p", known, book(policy)).rank
    assert rank in known.ranks
    ceiling = policy.ceiling or known.ranks[-1]
    if any(policy.floor <= each <= ceiling for each in known.ranks):
        assert policy.floor <= rank <= ceiling


@given(facts(), POLICIES)
def test_silence_uses_the_default_policy_and_says_so(known: RankFacts, policy: Policy) -> None:
    silent = decide(None, None, known, book(policy))
    assert silent.reason is RankReason.DEFAULT
    assert silent.rank == decide("auto", None, known, book(policy)).rank == decide(None, "p", known, book(policy)).rank


@given(facts(), POLICIES, st.integers(1, 70), st.none() | st.integers(0, 60), st.sampled_from(["auto", "max", 1, 7, None]))
def test_no_caller_is_served_outside_its_bounds(
    known: RankFacts, policy: Policy, floor: int, extra: int | None, wish: RankWish
) -> None:
    bounds = RankBounds(floor, None if extra is None else floor + extra)
    allowed = bounds.of(known.ranks)
    free = outcome(wish, known, policy, RankBounds())
    bound = outcome(wish, known, policy, bounds)
    if isinstance(bound, RankDecision):
        assert bound.rank in allowed
        # Nothing changes for a rank that is allowed, and what a request names is never replaced by another.
        assert bound == free or (wish in ("auto", None) and isinstance(free, RankDecision) and free.rank not in allowed)
    else:
        assert not allowed or (wish not in ("auto", None) and (not isinstance(free, RankDecision) or free.rank not in allowed))


def outcome(wish: RankWish, known: RankFacts, policy: Policy, bounds: RankBounds) -> RankDecision | type[Exception]:
    try:
        return decide(wish, None, known, book(policy), bounds)
    except (IllegalRank, InvalidRequest) as error:
        return type(error)


def test_the_refusal_of_a_rank_names_those_that_the_caller_may_use() -> None:
    known = RankFacts((1, 2, 4, 8))
    with pytest.raises(InvalidRequest, match="rank: 8 is outside what this API key may use, 1 to 4; legal here: 1, 2, 4"):
        decide(8, None, known, book(Policy(PolicyKind.MAX)), RankBounds(1, 4))
    with pytest.raises(IllegalRank, match=r"legal ranks: 1, 2, 4$"):
        decide(3, None, known, book(Policy(PolicyKind.MAX)), RankBounds(1, 4))
    with pytest.raises(InvalidRequest, match="may use ranks 16 or more, and the adapter has none there; it has: 1, 2, 4, 8"):
        decide("auto", None, known, book(Policy(PolicyKind.MAX)), RankBounds(16))


@given(facts(), st.floats(0, 0.9))
def test_quality_takes_the_smallest_rank_that_is_good_enough(known: RankFacts, tolerance: float) -> None:
    rank = decide("auto", None, known, book(Policy(PolicyKind.QUALITY, tolerance=tolerance))).rank
    if known.quality is None:
        assert rank == known.ranks[-1]
        return
    metric = known.quality.primary
    sign = 1 if metric.higher_is_better else -1
    best = max(sign * value for value in metric.values.values())
    good = [r for r, value in metric.values.items() if sign * value >= best - tolerance * abs(best)]
    assert rank == min(good)


@given(facts(), st.floats(0, 0.9), st.floats(0, 0.9))
def test_more_tolerance_never_takes_a_larger_rank(known: RankFacts, one: float, other: float) -> None:
    few, many = sorted((one, other))
    rank = {t: decide("auto", None, known, book(Policy(PolicyKind.QUALITY, tolerance=t))).rank for t in (few, many)}
    assert rank[many] <= rank[few]


@given(facts(), st.floats(0.001, 2))
def test_budget_takes_the_largest_rank_it_can_pay(known: RankFacts, share: float) -> None:
    decision = decide("auto", None, known, book(Policy(PolicyKind.BUDGET, share=share)))
    affordable = [r for r in known.ranks if known.parameters[r] <= share * known.base_parameters]
    expected = (affordable[-1], RankReason.BUDGET) if affordable else (known.ranks[0], RankReason.FLOOR)
    assert (decision.rank, decision.reason) == expected


@given(facts())
def test_a_legal_rank_is_served_as_requested_and_any_other_refused(known: RankFacts) -> None:
    chosen = book(Policy(PolicyKind.MAX))
    for rank in range(1, 70):
        if rank in known.ranks:
            assert decide(rank, None, known, chosen) == RankDecision(rank, RankReason.REQUESTED, "requested")
        else:
            with pytest.raises(IllegalRank) as caught:
                decide(rank, None, known, chosen)
            assert caught.value.legal == known.ranks
    assert decide("max", None, known, chosen).rank == known.ranks[-1]


@pytest.mark.parametrize(
    ("policy", "quality", "rank", "reason"),
    [
        (Policy(PolicyKind.FIXED, rank=4), None, 4, RankReason.REQUESTED),
        (Policy(PolicyKind.FIXED, rank=6), None, 4, RankReason.REQUESTED),
        (Policy(PolicyKind.MAX), None, 16, RankReason.REQUESTED),
        (Policy(PolicyKind.MAX, ceiling=9), None, 8, RankReason.REQUESTED),
        (Policy(PolicyKind.QUALITY), None, 16, RankReason.DEFAULT),
        (Policy(PolicyKind.QUALITY), profile(r4=59.5, r8=60.0, r16=59.9), 4, RankReason.QUALITY),
        (Policy(PolicyKind.QUALITY, floor=8), profile(r4=59.5, r8=60.0, r16=59.9), 8, RankReason.FLOOR),
        (Policy(PolicyKind.QUALITY, ceiling=2), profile(r1=1, r2=2, r16=60), 2, RankReason.QUALITY),
        (Policy(PolicyKind.QUALITY), profile(higher_is_better=False, r1=2.0, r4=1.005, r16=1.0), 4, RankReason.QUALITY),
        (Policy(PolicyKind.QUALITY), profile(r1=-2.0, r4=-1.005, r16=-1.0), 4, RankReason.QUALITY),
        (Policy(PolicyKind.BUDGET, share=0.5), None, 4, RankReason.BUDGET),
        (Policy(PolicyKind.BUDGET, share=0.01), None, 1, RankReason.FLOOR),
        (Policy(PolicyKind.BUDGET, share=0.01, floor=4), None, 4, RankReason.FLOOR),
    ],
)
def test_policies_by_example(policy: Policy, quality: QualityProfile | None, rank: int, reason: RankReason) -> None:
    ranks = (1, 2, 4, 8, 16)
    known = RankFacts(ranks, quality, {r: 100 * r for r in ranks}, base_parameters=1000)
    assert decide(None, "p", known, book(policy)) == RankDecision(rank, reason, "p")


def test_a_rank_and_a_policy_contradict_each_other() -> None:
    known = RankFacts((1, 2))
    wishes: tuple[RankWish, ...] = (1, "max")
    for wish in wishes:
        with pytest.raises(InvalidRequest, match="contradicts rank"):
            decide(wish, "p", known, book(Policy(PolicyKind.MAX)))


def test_an_unknown_policy_is_refused_with_the_legal_names() -> None:
    with pytest.raises(InvalidRequest, match="no policy named 'best'; legal: max, p"):
        decide(None, "best", RankFacts((1,)), book(Policy(PolicyKind.MAX)))
    with pytest.raises(ValueError, match="'q' is no policy"):
        PolicyBook({"p": Policy(PolicyKind.MAX)}, "q")
