"""DyLoRA on transformers' Trainer (arXiv 2210.07558): one rank for all layers and micro-batches of a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from adapters.adapter import Adapter
from adapters.errors import InvalidAdapter
from adapters.training.dylora import DyLoRAConfig
from adapters.training.encoding import EncodedPair, LikeLengths, PairDataset, RightPad
from adapters.training.layer import factors, inject, read_adapter, set_rank
from adapters.training.muon import Muon

FACTORS_FILE = "factors.safetensors"
"""The part of a Trainer checkpoint that holds A and B; the base is never written."""


class OptimizerName(StrEnum):
    """What moves the factors."""

    ADAMW = "adamw"
    MUON = "muon"
    """Not in the paper; `adapters.training.muon`. A and B are matrices, each moved as one."""


@dataclass(frozen=True)
class TrainSettings:
    """How long and how hard to train: linear warm-up, then cosine to zero.

    Attributes:
        steps: optimiser steps.
        batch_size: pairs in a micro-batch.
        accumulation: micro-batches in an optimiser step.
        warmup_steps: steps of linear warm-up.
        checkpoint_steps: steps between checkpoints; 0 writes none.
    """

    steps: int
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    warmup_steps: int = 50
    max_grad_norm: float = 1.0
    checkpoint_steps: int = 0
    optimizer: OptimizerName = OptimizerName.ADAMW
    seed: int = 0


def train_dylora(
    model: PreTrainedModel,
    pairs: Sequence[EncodedPair],
    config: DyLoRAConfig,
    settings: TrainSettings,
    folder: Path,
    base_model: str | None = None,
    resume: bool = False,
) -> Adapter:
    """Train a nested adapter on `model`, whose linear layers are wrapped in place and stay wrapped.

    Args:
        model: a causal language model, in fp32.
        folder: for checkpoints.
        base_model: the base's name, as the adapter is to state it.
        resume: go on from the last checkpoint in `folder`, if there is one.

    Raises:
        InvalidAdapter: the targets don't fit the model, or the checkpoint doesn't fit the targets.
    """
    torch.manual_seed(settings.seed)
    inject(model, config.adapter_config(base_model), config.targets, config.dropout)
    trainer = DyLoRATrainer(config, model, pairs, settings, folder)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) if resume else None)
    set_rank(model, config.r_max)
    return read_adapter(model, config.adapter_config(base_model))


class PairTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer on encoded pairs, in random batches of like length."""

    def __init__(
        self, model: nn.Module, pairs: Sequence[EncodedPair], settings: TrainSettings, folder: Path, pad_token_id: int = 0
    ) -> None:
        super().__init__(
            model=model,
            args=training_arguments(settings, folder),
            train_dataset=PairDataset(pairs),
            data_collator=RightPad(pad_token_id),
        )
        self._lengths = [len(pair.prompt) + len(pair.completion) for pair in pairs]
        self._settings = settings
        self._module = model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's AdamW, or Muon on everything that is trained."""
        if self._settings.optimizer is OptimizerName.ADAMW:
            adamw: torch.optim.Optimizer = super().create_optimizer(model)
            return adamw
        trained = [p for p in self._module.parameters() if p.requires_grad]
        self.optimizer = Muon(trained, self._settings.learning_rate, weight_decay=self._settings.weight_decay)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> LikeLengths:
        return LikeLengths(self._lengths, self.args.per_device_train_batch_size, self.args.seed)


class DyLoRATrainer(PairTrainer):
    """Selects the step's rank before each pass, and checkpoints the factors only."""

    def __init__(
        self,
        config: DyLoRAConfig,
        model: PreTrainedModel,
        pairs: Sequence[EncodedPair],
        settings: TrainSettings,
        folder: Path,
    ) -> None:
        super().__init__(model, pairs, settings, folder, padding_id(model))
        self._dylora = config
        self._share = 1.0

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run and differentiate the micro-batch once at each of the step's ranks; returns the mean loss."""
        # global_step moves once per optimiser step: every micro-batch of the step sees the same ranks.
        ranks = self._dylora.passes(self.args.seed, self.state.global_step)
        self._share = 1 / len(ranks)
        losses = []
        for rank in ranks:
            set_rank(model, rank)
            # Trainer's step goes backward too, while the rank still holds: gradient checkpointing runs forward again.
            losses.append(super().training_step(model, inputs, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Trainer's loss: in training this pass's share of the step's, else that of full rank."""
        if model.training:
            loss: Tensor = super().compute_loss(model, *args, **kwargs)
            return loss * self._share
        set_rank(model, self._dylora.r_max)
        return super().compute_loss(model, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in factors(self._module).items()}, folder / FACTORS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_factors(model or self._module, Path(resume_from_checkpoint) / FACTORS_FILE)


@torch.no_grad()
def load_factors(model: nn.Module, file: Path) -> None:
    """Read A and B of every layer back from a checkpoint.

    Raises:
        InvalidAdapter: it is of other layers or other shapes; lists every offender.
    """
    stored, own = load_file(file), factors(model)
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


def training_arguments(settings: TrainSettings, folder: Path) -> TrainingArguments:
    """Trainer's own settings."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        save_strategy="steps" if settings.checkpoint_steps else "no",
        save_steps=settings.checkpoint_steps or 500,
        save_total_limit=2,
        logging_steps=max(1, settings.steps // 40),
        seed=settings.seed,
        data_seed=settings.seed,
        report_to="none",
        dataloader_pin_memory=False,
    )


def last_checkpoint(folder: Path) -> str | None:
    """The newest Trainer checkpoint in `folder`, None if there is none."""
    found: str | None = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return found


def padding_id(model: PreTrainedModel) -> int:
    """The token to pad with; which one doesn't matter, since padding is masked everywhere."""
    pad = model.config.pad_token_id
    return pad if isinstance(pad, int) else 0
