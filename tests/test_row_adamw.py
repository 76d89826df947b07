import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from adapters.training.row_adamw import RowAdamW

R_MAX = 4
DECAY = 0.1


def matrices(seed: int = 0) -> list[torch.nn.Parameter]:
    """A [r, in], B [out, r], and a head's weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((R_MAX, 7), (5, R_MAX), (3, 5), (3,))]


def by_row(params: Sequence[torch.nn.Parameter], weight_decay: float = DECAY) -> RowAdamW:
    a, b, *rest = params
    groups: list[dict[str, Any]] = [{"params": [a], "row_dim": 0}, {"params": [b], "row_dim": 1}, {"params": rest}]
    return RowAdamW(groups, lr=0.01, weight_decay=weight_decay)


def draw_gradients(params: Sequence[torch.Tensor], generator: torch.Generator) -> None:
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def rows_of(params: Sequence[torch.Tensor], start: int, stop: int) -> list[torch.Tensor]:
    return [params[0][start:stop].clone(), params[1][:, start:stop].clone()]


@pytest.mark.parametrize("weight_decay", [0.0, DECAY])
def test_with_all_rows_in_every_step_it_is_torchs_adamw(weight_decay: float) -> None:
    ours, theirs = matrices(), matrices()
    optimizers = [by_row(ours, weight_decay=weight_decay), torch.optim.AdamW(theirs, lr=0.01, weight_decay=weight_decay)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        draw_gradients(ours, generator)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_rows_that_take_no_part_stay_to_the_bit_after_they_have_gathered_momentum() -> None:
    params, generator = matrices(), torch.Generator().manual_seed(1)
    optimizer = by_row(params)
    for _ in range(3):
        draw_gradients(params, generator)
        optimizer.step()
    before = [rows_of(params, *outside) for outside in ((0, 2), (3, R_MAX))]
    moving = rows_of(params, 2, 3)
    optimizer.select_rows(2, 3)
    for _ in range(5):
        draw_gradients(params, generator)
        optimizer.step()
    after = [rows_of(params, *outside) for outside in ((0, 2), (3, R_MAX))]
    assert all(torch.equal(x, y) for old, new in zip(before, after, strict=True) for x, y in zip(old, new, strict=True))
    assert not any((x == y).any() for x, y in zip(moving, rows_of(params, 2, 3), strict=True))


def test_a_row_goes_its_way_as_if_the_others_steps_had_not_been() -> None:
    """Row 0 takes part in steps 0, 2, 4 ...: torch's AdamW on it alone, in those steps alone, leads to the same place."""
    params, generator = matrices(), torch.Generator().manual_seed(1)
    alone = torch.nn.Parameter(params[0][:1].detach().clone())
    optimizer, reference = by_row(params), torch.optim.AdamW([alone], lr=0.01, weight_decay=DECAY)
    for step in range(20):
        draw_gradients(params, generator)
        optimizer.select_rows(step % 2, R_MAX)
        optimizer.step()
        if step % 2 == 0 and params[0].grad is not None:
            alone.grad = params[0].grad[:1].clone()
            reference.step()
    torch.testing.assert_close(params[0][:1], alone, rtol=1e-5, atol=1e-6)


def test_a_loaded_state_goes_on_to_the_bit() -> None:
    params, generator = matrices(), torch.Generator().manual_seed(1)
    optimizer = by_row(params)
    for rank in (1, 4, 2, 3):
        draw_gradients(params, generator)
        optimizer.select_rows(0, rank)
        optimizer.step()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = by_row(copies)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for rank in (2, 1, 4):
        draw_gradients(params, generator)
        for p, q in zip(params, copies, strict=True):
            q.grad = p.grad
        for each in (optimizer, loaded):
            each.select_rows(0, rank)
            each.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_a_matrix_without_a_gradient_is_left_alone() -> None:
    params = matrices()
    before = params[1].detach().clone()
    optimizer = by_row(params)
    draw_gradients(params, torch.Generator().manual_seed(1))
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
