"""Training a small base model from nothing: Muon on its matrices, AdamW on the rest, resumable at any kill."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from adapters.training.muon import Muon

Batch = TypeVar("Batch")

START_DIVISOR, END_DIVISOR = 25.0, 25e4
"""The learning rate starts at peak / 25 and ends at peak / 250,000, as torch's OneCycleLR has it."""


@dataclass(frozen=True)
class PretrainSettings:
    """How long and how hard: cosine up to the peak over `warmup_share` of the steps, then cosine down.

    Attributes:
        matrix_learning_rate: Muon's, for the layers' matrices.
        learning_rate: AdamW's, for embeddings, norms, biases and head.
        weight_decay: of the matrices.
        report_steps: steps between two measurements on held-out text.
        checkpoint_steps: steps between two checkpoints; 0 writes none.
        bf16: products in bfloat16, Muon's too; weights and everything else stay float32. Twice as fast where the CPU has
            AMX, many times slower where it has no bf16 products at all.
    """

    steps: int
    warmup_share: float = 0.05
    matrix_learning_rate: float = 6e-3
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    report_steps: int = 50
    checkpoint_steps: int = 0
    bf16: bool = False


def pretrain(
    model: nn.Module,
    batches: Iterator[Batch],
    loss_of: Callable[[Batch], Tensor],
    held_out_loss: Callable[[], float],
    settings: PretrainSettings,
    checkpoint: Path | None = None,
    label: str = "base",
) -> None:
    """Train `model` in place.

    Args:
        batches: endless, and the same at every start: a resumed run skips those that it has seen.
        loss_of: the model's loss on one batch.
        held_out_loss: measured every `report_steps`, and written to standard error.
        checkpoint: a safetensors file to go on from where it exists, and to write; None for none.
        label: the progress bar's.
    """
    optimizers = new_optimizers(model, settings)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    done = load_checkpoint(checkpoint, model, optimizers) if checkpoint is not None and checkpoint.exists() else 0
    for _ in range(done):
        next(batches)
    model.train()
    progress = tqdm(range(done, settings.steps), desc=label, mininterval=2, initial=done, total=settings.steps)
    for step in progress:
        with _autocast(settings):
            loss = loss_of(next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * one_cycle(step, settings.steps, settings.warmup_share)
            with _autocast(settings):
                optimizer.step()
        model.zero_grad(set_to_none=True)
        if (step + 1) % settings.report_steps == 0:
            progress.write(f"step {step + 1}: loss {loss.item():.3f} training, {held_out_loss():.3f} held out")
        if checkpoint is not None and settings.checkpoint_steps and (step + 1) % settings.checkpoint_steps == 0:
            save_checkpoint(checkpoint, model, optimizers, step + 1)
        progress.set_postfix(loss=f"{loss.item():.3f}")


def _autocast(settings: PretrainSettings) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16)


def one_cycle(step: int, steps: int, warmup_share: float) -> float:
    """Share of the peak learning rate at `step`: torch's OneCycleLR, without a scheduler's state to restore."""
    top, end = warmup_share * steps - 1, steps - 1
    if step <= top:
        return _cosine(1 / START_DIVISOR, 1.0, step / top if top else 1.0)
    return _cosine(1.0, 1 / END_DIVISOR, (step - top) / (end - top))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def new_optimizers(model: nn.Module, settings: PretrainSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the repeated layers; AdamW for embeddings, norms, biases and head."""
    layers = [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]
    in_layers = {id(p) for layer in layers for p in layer.parameters() if p.ndim == 2}
    parameters = list(model.parameters())
    matrices = [p for p in parameters if id(p) in in_layers]
    rest = [p for p in parameters if id(p) not in in_layers]
    return [
        Muon(matrices, settings.matrix_learning_rate, weight_decay=settings.weight_decay),
        torch.optim.AdamW(rest, settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save_checkpoint(file: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
    """Write weights, optimiser state and the number of steps done; a kill leaves the old file or the new one."""
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    for index, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{parameter}.{name}": torch.as_tensor(value) for name, value in state.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial, {"step": str(step)})
    partial.replace(file)


@torch.no_grad()
def load_checkpoint(file: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Restore what `save_checkpoint` wrote; returns the number of steps done."""
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    with safe_open(file, framework="pt") as stored:
        for name, parameter in model.named_parameters():
            parameter.copy_(stored.get_tensor(f"model.{name}"))
        for key in stored.keys():  # noqa: SIM118  # not a mapping
            if key.startswith("optimizer."):
                _, index, number, name = key.split(".")
                states[int(index)].setdefault(int(number), {})[name] = stored.get_tensor(key)
        step = int(stored.metadata()["step"])
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step
