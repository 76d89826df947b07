"""The optimisers that are not Trainer's own, over what a model trains."""

import torch
from torch import nn

from adapters.errors import TrainingError
from adapters.training.layer import nested_layers
from adapters.training.muon import Muon
from adapters.training.row_adamw import RowAdamW
from adapters.training.settings import TrainSettings


def muon(model: nn.Module, settings: TrainSettings) -> Muon:
    """Muon on everything that is trained. Raises TrainingError if some of it is no matrix."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = [name for name, p in trained.items() if p.ndim != 2]
    if others:
        raise TrainingError(f"optimiser 'muon' moves matrices only, not {', '.join(others)}; choose 'adamw' or 'row-adamw'")
    return Muon(trained.values(), settings.learning_rate, weight_decay=settings.weight_decay)


def row_adamw(model: nn.Module, settings: TrainSettings) -> RowAdamW:
    """RowAdamW: A by its rows, B by its columns, what is trained whole in every step and without decay of its vectors."""
    layers = [layer for _, layer in nested_layers(model)]
    a, b = [layer.lora_a for layer in layers], [layer.lora_b for layer in layers]
    factors = {id(p) for p in (*a, *b)}
    rest: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad and id(p) not in factors]
    decay = settings.weight_decay
    groups = [
        {"params": a, "row_dim": 0, "weight_decay": decay},
        {"params": b, "row_dim": 1, "weight_decay": decay},
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return RowAdamW([group for group in groups if group["params"]], settings.learning_rate)
