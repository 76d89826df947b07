"""AdapterConfig: legal ranks, and the one scale that training, merging, batching and export call."""

import math

import pytest

from adapters.config import AdapterConfig, AdapterKind
from adapters.errors import IllegalRank, InvalidAdapter


def test_a_dylora_divides_alpha_by_the_rank() -> None:
    config = AdapterConfig(AdapterKind.DYLORA, r_max=8, alpha=16.0)
    assert config.ranks == tuple(range(1, 9))
    assert [config.scale(rank) for rank in (1, 2, 8)] == [16.0, 8.0, 2.0]


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    config = AdapterConfig(AdapterKind.DYLORA, r_max=8, alpha=16.0, rslora=True)
    assert config.scale(4) == 8.0
    assert config.scale(2) == pytest.approx(16 / math.sqrt(2))


@pytest.mark.parametrize("kind", [AdapterKind.RENESTED, AdapterKind.LORA])
def test_other_kinds_carry_their_scale_inside(kind: AdapterKind) -> None:
    assert AdapterConfig(kind, r_max=4, alpha=16.0).scale(4) == 1.0


def test_a_plain_lora_has_one_rank() -> None:
    config = AdapterConfig(AdapterKind.LORA, r_max=8, alpha=16.0)
    assert config.ranks == (8,)
    with pytest.raises(IllegalRank) as caught:
        config.scale(4)
    assert caught.value.legal == (8,)


def test_ranks_may_be_restricted() -> None:
    config = AdapterConfig(AdapterKind.DYLORA, r_max=8, alpha=16.0, ranks=(2, 4, 8))
    with pytest.raises(IllegalRank, match="legal ranks: 2, 4, 8"):
        config.check_rank(3)


@pytest.mark.parametrize("ranks", [(1, 2), (8, 4), (0, 8), (4, 4, 8), (4, 8, 9)])
def test_ranks_must_ascend_to_r_max(ranks: tuple[int, ...]) -> None:
    with pytest.raises(InvalidAdapter, match="ranks must ascend"):
        AdapterConfig(AdapterKind.DYLORA, r_max=8, alpha=1.0, ranks=ranks)


@pytest.mark.parametrize(("r_max", "alpha"), [(0, 1.0), (4, 0.0), (4, -1.0), (4, math.nan), (4, math.inf)])
def test_nonsense_is_refused(r_max: int, alpha: float) -> None:
    with pytest.raises(InvalidAdapter):
        AdapterConfig(AdapterKind.DYLORA, r_max=r_max, alpha=alpha)
