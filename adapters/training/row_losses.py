"""Loss by row of a batch: sums that can be added up over batches and processes, and only then divided."""

import torch
from torch import Tensor
from torch.nn import functional

from adapters.training.encoding import IGNORED


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over each row of a batch.

    Args:
        logits: [rows, length, vocabulary] of a causal language model, or [rows, classes] of a classifier.
        labels: [rows, length], where IGNORED is left out and each token is predicted from those before; or [rows].

    Returns:
        [rows, 3]: the loss in nats, the tokens (or texts) it is of, and how many of them have the highest logit.
    """
    if labels.ndim == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    row = counted.nonzero()[:, 0]  # [counted]
    chosen, targets = logits[counted].float(), labels[counted]
    loss = functional.cross_entropy(chosen, targets, reduction="none")
    parts = torch.stack([loss, torch.ones_like(loss), (chosen.argmax(-1) == targets).float()], dim=1)
    return torch.zeros(len(labels), 3, device=loss.device).index_add_(0, row, parts)
