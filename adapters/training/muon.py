"""Muon (Jordan et al. 2024), in fp32: on the small demo base it needs about half the steps that AdamW needs.

torch.optim.Muon is the same rule, but orthogonalises in bf16, which takes seconds a step on a CPU that has no
bf16 products.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration, from the authors
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is brought to near-equal singular values, for matrices [out, in].

    The update is scaled by 0.2 sqrt(max(out, in)), so that learning rates and decay are those of AdamW (arXiv
    2502.16982).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                mean = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalized(matrix.grad.lerp(mean, group["momentum"]))  # Nesterov's look ahead
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonalized(matrix: Tensor) -> Tensor:
    """Roughly U V^T of the SVD U S V^T of `matrix` [m, n]: singular values come out between 0.5 and 1.5."""
    a, b, c = _COEFFICIENTS
    x: Tensor = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # the Gram matrix is then the smaller one
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
