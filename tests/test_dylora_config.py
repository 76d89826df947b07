from collections import Counter
from typing import Any

import pytest

from adapters.errors import InvalidAdapter
from adapters.training.dylora import DyLoRAConfig, RankDistribution, RankPer

DRAWS = 8000


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DyLoRAConfig(r_max=4), [0.25, 0.25, 0.25, 0.25]),
        (DyLoRAConfig(r_max=8, ranks=(2, 8)), [0.5, 0.5]),
        (DyLoRAConfig(r_max=3, distribution=RankDistribution.GEOMETRIC, geometric_p=0.5), [4 / 7, 2 / 7, 1 / 7]),
        (DyLoRAConfig(r_max=3, distribution=RankDistribution.WEIGHTS, weights=(1, 0, 3)), [0.25, 0, 0.75]),
    ],
)
def test_ranks_are_drawn_as_often_as_the_distribution_says(config: DyLoRAConfig, expected: list[float]) -> None:
    counts = Counter(config.draw(7, step) for step in range(DRAWS))
    ranks = config.adapter_config().ranks
    assert set(counts) <= set(ranks)
    assert [counts[rank] / DRAWS for rank in ranks] == pytest.approx(expected, abs=0.02)


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    config = DyLoRAConfig(r_max=16)
    one, other = ([config.draw(seed, step) for step in range(50)] for seed in (0, 1))
    assert one == [config.draw(0, step) for step in range(50)]
    assert one != other


def test_sandwich_adds_full_rank_and_never_runs_it_twice() -> None:
    config = DyLoRAConfig(r_max=4, sandwich=True)
    passes = [config.passes(0, step) for step in range(100)]
    assert {p for p in passes if len(p) == 2} == {(4, 1), (4, 2), (4, 3)}
    assert [p for p in passes if len(p) == 1] == [(4,)] * sum(config.draw(0, step) == 4 for step in range(100))


@pytest.mark.parametrize("rows", [1, 3, 16, 50])
@pytest.mark.parametrize(
    ("config", "shares"),
    [
        (DyLoRAConfig(r_max=4), [0.25, 0.25, 0.25, 0.25]),
        (DyLoRAConfig(r_max=8, ranks=(2, 8)), [0.5, 0.5]),
        (DyLoRAConfig(r_max=3, distribution=RankDistribution.WEIGHTS, weights=(1, 0, 3)), [0.25, 0, 0.75]),
    ],
)
def test_each_rank_gets_its_share_of_a_batch_and_no_row_more_or_less(
    config: DyLoRAConfig, shares: list[float], rows: int
) -> None:
    drawn = [config.draw_rows(5, step, rows) for step in range(400)]
    ranks = config.adapter_config().ranks
    for batch in drawn:
        assert len(batch) == rows and set(batch) <= set(ranks)
        assert all(abs(batch.count(rank) - share * rows) < 1 for rank, share in zip(ranks, shares, strict=True))
    total = Counter(rank for batch in drawn for rank in batch)
    assert [total[rank] / (400 * rows) for rank in ranks] == pytest.approx(shares, abs=0.05)


def test_the_rows_of_a_step_depend_on_seed_and_step_alone_and_come_in_no_order() -> None:
    config = DyLoRAConfig(r_max=8)
    assert config.draw_rows(0, 3, 64) == config.draw_rows(0, 3, 64)
    assert len({config.draw_rows(0, step, 64) for step in range(20)} | {config.draw_rows(1, 3, 64)}) == 21
    assert list(config.draw_rows(0, 3, 64)) != sorted(config.draw_rows(0, 3, 64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"geometric_p": 1.0}, "geometric_p must lie between 0 and 1"),
        ({"sandwich": True, "rank_per": RankPer.ROW}, "choose neither"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"init_scale": 0.0}, "init_scale must be above 0, not 0.0"),
        ({"init_scale": float("nan")}, "init_scale must be above 0, not nan"),
        ({"weights": (1.0,) * 8}, "weights are given, but distribution is not 'weights'"),
        ({"distribution": RankDistribution.WEIGHTS, "weights": (1.0,)}, "weights must be 8 numbers"),
        ({"distribution": RankDistribution.WEIGHTS, "weights": (0.0,) * 8}, "weights must be 8 numbers"),
        ({"ranks": (2, 4)}, "end with r_max"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidAdapter, match=message):
        DyLoRAConfig(**fields)
