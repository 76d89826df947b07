"""TrainSettings as transformers' own TrainingArguments."""

from pathlib import Path

import torch
from transformers import TrainingArguments

from adapters.training.settings import TrainSettings


class OneDevice(TrainingArguments):  # type: ignore[misc]
    """Trainer's arguments for one device per process; torchrun and accelerate start a process for each.

    On a machine with several GPUs and a single process Trainer would copy the model to all of them (nn.DataParallel): the
    rank of a step, which is set on the layers, would not follow, and a batch would be that many times as large.
    """

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: one at most."""
        return min(1, int(super().n_gpu))


def training_arguments(settings: TrainSettings, folder: Path) -> OneDevice:
    """Trainer's arguments; `folder` is for its checkpoints."""
    return OneDevice(
        output_dir=str(folder),
        num_train_epochs=settings.num_train_epochs,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=_steps(settings.warmup_steps),
        lr_scheduler_type=str(settings.lr_scheduler_type),
        max_grad_norm=settings.max_grad_norm,
        label_smoothing_factor=settings.label_smoothing_factor,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),  # bf16 is refused on a CPU that isn't named
        activation_checkpointing=settings.gradient_checkpointing,
        # The re-entrant kind needs an input with a gradient, which a frozen embedding doesn't give.
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        eval_strategy="no" if settings.eval_steps is None else "steps",
        eval_steps=None if settings.eval_steps is None else _steps(settings.eval_steps),
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=_steps(settings.save_steps or 500),
        save_total_limit=2,
        logging_steps=_steps(settings.logging_steps),
        # It would hide a loss that is NaN behind the mean of those before.
        logging_nan_inf_filter=False,
        report_to="none",  # PairTrainer adds TensorBoard itself, to say where its files go
        disable_tqdm=settings.disable_tqdm,
        seed=settings.seed,
        data_seed=settings.seed,
        # Unused rows of a factor have a gradient too: zero.
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
    )


def _steps(number: float) -> float:
    """Trainer takes a share as a float and steps as an integer."""
    return number if number < 1 and number else int(number)
