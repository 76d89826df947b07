"""Checkpoints of a run: what is trained, never the base; and which of them are whole."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapters.errors import InvalidAdapter, TrainingError

TRAINED_FILE = "trained.safetensors"
"""The part of a Trainer checkpoint that holds A, B and what is trained whole."""

COMPLETE_FILE = "complete"
"""Written last: a checkpoint without it was cut short."""

_FOLDER = re.compile(r"checkpoint-(\d+)")


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, by parameter name, detached: A and B of every layer, and the modules that are trained whole."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write what is trained; the folder is made if absent."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in trained_tensors(model).items()}, folder / TRAINED_FILE)


@torch.no_grad()
def load_trained(model: nn.Module, folder: Path) -> None:
    """Read back what `save_trained` wrote.

    Raises:
        InvalidAdapter: it is of other layers or other shapes; lists every offender.
        TrainingError: it can't be read.
    """
    try:
        stored = load_file(folder / TRAINED_FILE)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{folder / TRAINED_FILE} can't be read ({error}); delete {folder} to go on from before it"
        ) from error
    own = trained_tensors(model)
    problems = [f"{name} is in only one of checkpoint and model" for name in sorted(stored.keys() ^ own.keys())]
    problems += [
        f"{name} has shape {tuple(stored[name].shape)} in the checkpoint, {tuple(own[name].shape)} in the model"
        for name in sorted(stored.keys() & own.keys())
        if stored[name].shape != own[name].shape
    ]
    if problems:
        raise InvalidAdapter(problems)
    for name, value in own.items():  # detached, but of the same storage
        value.copy_(stored[name])


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in `folder`, None if there is none."""
    steps = [int(match[1]) for path in folder.glob("*") if (match := _FOLDER.fullmatch(path.name))]
    paths = (folder / f"checkpoint-{step}" for step in sorted(steps, reverse=True))
    return next((str(path) for path in paths if (path / COMPLETE_FILE).exists()), None)
