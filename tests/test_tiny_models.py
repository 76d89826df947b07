"""The tiny models are fit to compare by: the same for everyone, and not all alike."""

from pathlib import Path

import pytest
import torch

from adapters.checkpoint import TENSORS_FILE
from tests.tiny_models import TINY_KINDS, random_peft_adapter, some_tokens, tiny_model


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_a_seed_makes_one_model_and_leaves_the_global_state_alone(kind: str) -> None:
    before = torch.random.get_rng_state()
    one, same, other = tiny_model(kind), tiny_model(kind), tiny_model(kind, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    tokens = some_tokens()
    assert torch.equal(one(tokens).logits, same(tokens).logits)
    assert not torch.allclose(one(tokens).logits, other(tokens).logits, atol=1.0)


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_the_best_token_differs_from_place_to_place_and_seldom_by_a_hair(kind: str) -> None:
    best = tiny_model(kind)(some_tokens(rows=8, length=16)).logits.topk(2)
    assert best.indices[..., 0].unique().numel() > 20
    assert ((best.values[..., 0] - best.values[..., 1]) > 1e-2).float().mean() > 0.95


def test_a_seed_makes_one_adapter(tmp_path: Path) -> None:
    one, same, other = (random_peft_adapter("llama", tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert (one / TENSORS_FILE).read_bytes() == (same / TENSORS_FILE).read_bytes()
    assert (one / TENSORS_FILE).read_bytes() != (other / TENSORS_FILE).read_bytes()
