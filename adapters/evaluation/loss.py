"""The loss of completions: nats and tokens of each, from which any mean can be made."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from adapters.evaluation.resampling import Array
from adapters.training.encoding import IGNORED, EncodedPair, PairDataset, RightPad
from adapters.training.padding import padding_id


@torch.no_grad()
def completion_losses(model: PreTrainedModel, pairs: Sequence[EncodedPair], batch_size: int = 32) -> Array:
    """Of each pair, its loss in nats and the tokens it is over, [pairs, 2]; the end-of-text token among them.

    A first token without anything before it is not predicted, and not counted.
    """
    model.eval()
    collate, dataset = RightPad(padding_id(model)), PairDataset(pairs)
    by_length = sorted(range(len(pairs)), key=lambda i: len(pairs[i].prompt) + len(pairs[i].completion))
    losses = np.zeros((len(pairs), 2))
    for start in range(0, len(pairs), batch_size):
        rows = by_length[start : start + batch_size]
        batch = {name: tensor.to(model.device) for name, tensor in collate([dataset[i] for i in rows]).items()}
        targets = batch.pop("labels")[:, 1:]  # [rows, length - 1]
        measured = targets != IGNORED
        logits = model(**batch).logits[:, :-1][measured]  # [measured, vocabulary]
        nats = targets.new_zeros(targets.shape, dtype=torch.float64)
        nats[measured] = functional.cross_entropy(logits.float(), targets[measured], reduction="none").double()
        losses[rows] = torch.stack([nats.sum(1), measured.sum(1).double()], dim=1).cpu().numpy()
    return losses


def completion_loss(model: PreTrainedModel, pairs: Sequence[EncodedPair], batch_size: int = 32) -> float:
    """Mean loss in nats per completion token, the end-of-text token among them."""
    nats, tokens = completion_losses(model, pairs, batch_size).sum(axis=0)
    return float(nats / tokens)
