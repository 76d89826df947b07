"""AdamW that moves only the rows of A and columns of B that a step trains, and keeps their state apart.

A step at rank b says nothing of the rows beyond b. torch's AdamW moves them all the same, by momentum and by weight
decay, and counts the step for them in its correction of bias. Here a row that takes no part stays as it is, to the bit,
its moments and its count of steps with it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Scales = tuple[Tensor, Tensor]
"""What the rows' bias corrections make of epsilon and of the learning rate, [rows, 1]."""


class RowAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) by row: with all rows in every step it is torch.optim.AdamW, up to rounding.

    Args:
        params: groups may have `row_dim`: the dimension along which the rows of their matrices lie, 0 for A [r, in] and
            1 for B [out, r]. A group without one takes part in every step, whole.
        lr, betas, eps, weight_decay: AdamW's; here they may differ from group to group as well.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "row_dim": None}
        super().__init__(params, defaults)
        self._rows: tuple[int, int] | None = None

    def select_rows(self, start: int, stop: int) -> None:
        """From the next step on, move only rows `start` up to but without `stop`; all of them until this is called."""
        self._rows = (start, stop)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the selected rows of every matrix that has a gradient; `closure` is not called."""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            if matrices:
                self._move(matrices, group)

    def _move(self, matrices: Sequence[Tensor], group: dict[str, Any]) -> None:
        is_by_row, (beta1, beta2), lr = group["row_dim"] is not None, group["betas"], group["lr"]
        rows = slice(*self._rows) if is_by_row and self._rows is not None else slice(None)
        is_transposed = group["row_dim"] == 1
        states = [self._state(p, group["row_dim"]) for p in matrices]
        scales = self._advance(matrices, states, rows, group)
        values = [(p.T if is_transposed else p)[rows] for p in matrices]
        gradients = [(p.grad.T if is_transposed else p.grad)[rows].contiguous() for p in matrices if p.grad is not None]
        means, squares = [s["exp_avg"][rows] for s in states], [s["exp_avg_sq"][rows] for s in states]
        # One call for the matrices of a group: a call for each would cost more than the arithmetic.
        if group["weight_decay"]:
            torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, [epsilon for epsilon, _ in scales])
        updates = torch._foreach_div(means, roots)
        torch._foreach_mul_(updates, [rate for _, rate in scales])
        torch._foreach_sub_(values, updates)

    def _state(self, matrix: Tensor, row_dim: int | None) -> dict[str, Any]:
        state: dict[str, Any] = self.state[matrix]
        if not state:
            # Rows first, also for B: a step then reads and writes whole stretches of memory.
            shape = matrix.T.shape if row_dim == 1 else matrix.shape
            state["exp_avg"] = matrix.new_zeros(shape)
            state["exp_avg_sq"] = matrix.new_zeros(shape)
            # torch's load_state_dict leaves a state of this name as it is: on the CPU, in float64.
            state["step"] = torch.zeros(1 if row_dim is None else shape[0], dtype=torch.float64)
        return state

    def _advance(
        self, matrices: Sequence[Tensor], states: Sequence[dict[str, Any]], rows: slice, group: dict[str, Any]
    ) -> list[Scales]:
        """Count the step for the selected rows, and return what each matrix's counts make of epsilon and rate.

        torch moves a value by `lr / c1 * m / (sqrt(v) / sqrt(c2) + eps)`, where c1 and c2 correct the bias. This is
        `lr sqrt(c2) / c1 * m / (sqrt(v) + sqrt(c2) eps)`, which leaves one number by row in each of two places.
        """
        known: dict[tuple[Any, ...], Scales] = {}
        scales = []
        for matrix, state in zip(matrices, states, strict=True):
            counts = state["step"][rows]
            counts += 1
            # As a rule every matrix of a group has taken part in the same steps.
            key = (counts.numpy().tobytes(), matrix.device, matrix.dtype, matrix.ndim)
            if key not in known:
                known[key] = _scales(counts, matrix, group)
            scales.append(known[key])
        return scales


def _scales(counts: Tensor, matrix: Tensor, group: dict[str, Any]) -> Scales:
    beta1, beta2 = group["betas"]
    root = (1 - beta2**counts).sqrt()
    epsilon, rate = root * group["eps"], root * group["lr"] / (1 - beta1**counts)
    shape = (-1, *[1] * (matrix.ndim - 1))  # rows first
    return epsilon.to(matrix).reshape(shape), rate.to(matrix).reshape(shape)
