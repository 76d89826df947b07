"""How long and how hard to train, under the names that transformers' TrainingArguments have for it.

Nothing here imports torch: the command line reads its defaults from these classes.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from adapters.errors import TrainingError
from adapters.training.dylora import DyLoRAConfig, UpdateRule


class OptimizerName(StrEnum):
    """What moves the factors."""

    ADAMW = "adamw"
    ROW_ADAMW = "row-adamw"
    """AdamW that touches only the rows of A and columns of B that a step trains; `adapters.training.row_adamw`."""
    MUON = "muon"
    """Not in the paper; `adapters.training.muon`. A and B are matrices, each moved as one."""


class SchedulerName(StrEnum):
    """How the learning rate goes on after its warm-up: those of transformers' schedulers that need nothing else said."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant_with_warmup"
    INVERSE_SQRT = "inverse_sqrt"


class ReportTo(StrEnum):
    """Where the log goes besides the terminal."""

    NONE = "none"
    TENSORBOARD = "tensorboard"


@dataclass(frozen=True)
class TrainSettings:
    """How long and how hard to train.

    Attributes:
        num_train_epochs: passes over the data; a fraction is a part of one.
        max_steps: optimiser steps, in the place of `num_train_epochs`.
        per_device_train_batch_size: examples in a micro-batch of one process.
        per_device_eval_batch_size: the same in evaluation.
        gradient_accumulation_steps: micro-batches in an optimiser step of one process.
        learning_rate: at its highest, after the warm-up.
        weight_decay: AdamW's.
        warmup_steps: steps of linear warm-up; below 1, their share of all steps.
        lr_scheduler_type: what follows the warm-up.
        max_grad_norm: the norm that the gradient is cut down to; 0 never cuts.
        label_smoothing_factor: share of each target's probability that is spread over all classes, in training only.
        optim: what moves the factors.
        bf16: compute in bfloat16; the factors stay float32.
        gradient_checkpointing: keep no activations and run forward again for the gradients: less memory, more time.
        eval_steps: steps between evaluations, below 1 their share of all steps; None evaluates at the end only.
        eval_ranks: ranks to evaluate at; 1, 2, 4, ... and r_max unless given.
        save_steps: steps between checkpoints, below 1 their share of all steps; 0 writes none.
        logging_steps: steps between lines of the log; below 1, their share of all steps.
        report_to: where the log goes besides the terminal.
        disable_tqdm: print the log's lines without a progress bar.
        seed: of the first factors, the ranks, the data's order and dropout.

    Raises:
        TrainingError: a value out of its range; lists every offender.
    """

    num_train_epochs: float = 3.0
    max_steps: int | None = None
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    warmup_steps: float = 0.06
    lr_scheduler_type: SchedulerName = SchedulerName.COSINE
    max_grad_norm: float = 1.0
    label_smoothing_factor: float = 0.0
    optim: OptimizerName = OptimizerName.ADAMW
    bf16: bool = False
    gradient_checkpointing: bool = False
    eval_steps: float | None = None
    eval_ranks: tuple[int, ...] = ()
    save_steps: float = 500
    logging_steps: float = 0.025
    report_to: ReportTo = ReportTo.NONE
    disable_tqdm: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_1 = {
            "max_steps": self.max_steps,
            "per_device_train_batch_size": self.per_device_train_batch_size,
            "per_device_eval_batch_size": self.per_device_eval_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        }
        problems = [f"{name} must be at least 1, not {v}" for name, v in at_least_1.items() if v is not None and v < 1]
        above_0 = {"num_train_epochs": self.num_train_epochs, "learning_rate": self.learning_rate}
        problems += [f"{name} must be above 0, not {v}" for name, v in above_0.items() if not 0 < v < math.inf]
        not_negative = {"weight_decay": self.weight_decay, "max_grad_norm": self.max_grad_norm}
        problems += [f"{name} must be at least 0, not {v}" for name, v in not_negative.items() if not 0 <= v < math.inf]
        if not 0 <= self.label_smoothing_factor < 1:
            problems.append(f"label_smoothing_factor must be at least 0 and below 1, not {self.label_smoothing_factor}")
        if not 0 <= self.seed < 1 << 32:
            problems.append(f"seed must lie between 0 and 2**32 - 1, not {self.seed}")
        spans = {"warmup_steps": self.warmup_steps, "save_steps": self.save_steps, "logging_steps": self.logging_steps}
        if self.eval_steps is not None:
            spans["eval_steps"] = self.eval_steps
        for name, steps in spans.items():
            is_legal = 0 < steps < 1 or (steps >= 1 and float(steps).is_integer())
            if not (is_legal or (steps == 0 and name in ("warmup_steps", "save_steps"))):
                problems.append(f"{name} must be a whole number of steps, or below 1 a share of all steps; not {steps}")
        if problems:
            raise TrainingError("; ".join(problems))

    def check_fits(self, config: DyLoRAConfig) -> None:
        """Raise TrainingError where these settings can't train `config`; IllegalRank for `eval_ranks` it doesn't have."""
        if config.update is UpdateRule.FROZEN and self.optim is not OptimizerName.ROW_ADAMW:
            raise TrainingError(
                f"update rule 'frozen' needs the optimiser 'row-adamw', not '{self.optim}', whose momentum and weight decay "
                "would move the frozen rows as well"
            )
        for rank in self.eval_ranks:
            config.adapter_config().check_rank(rank)

    def ranks_to_evaluate(self, config: DyLoRAConfig) -> tuple[int, ...]:
        """`eval_ranks`, or the powers of two among the legal ranks, and r_max."""
        legal = config.adapter_config().ranks
        return self.eval_ranks or tuple(rank for rank in legal if rank & (rank - 1) == 0 or rank == config.r_max)
