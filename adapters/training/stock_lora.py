"""An ordinary LoRA by stock PEFT, on the same Trainer as the nested one: what people bring along, and what to compare with."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from adapters.training.checkpoints import last_checkpoint
from adapters.training.dylora import ALL_LINEAR
from adapters.training.heads import is_classifier
from adapters.training.padding import padding_id
from adapters.training.rows import Rows
from adapters.training.settings import TrainSettings
from adapters.training.trainer import PairTrainer


def train_stock_lora(
    model: PreTrainedModel,
    rows: Rows,
    rank: int,
    alpha: int,
    settings: TrainSettings,
    checkpoints: Path,
    base_model: str,
    targets: Sequence[str] | str = ALL_LINEAR,
) -> PeftModel:
    """Train LoRA of one rank with PEFT and Trainer; a classifier's head is trained with it, as PEFT does.

    Args:
        targets: PEFT's `target_modules`.

    Returns:
        PEFT's model; its `save_pretrained` writes the checkpoint.
    """
    torch.manual_seed(settings.seed)
    peft_model = wrapped(model, rank, alpha, targets, base_model)
    trainer = PairTrainer(peft_model, rows, settings, checkpoints, padding_id(model))
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    return peft_model


def wrapped(model: PreTrainedModel, rank: int, alpha: int, targets: Sequence[str] | str, base_model: str) -> PeftModel:
    """`model` with PEFT's LoRA on it, untrained."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="SEQ_CLS" if is_classifier(model) else "CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    # PEFT would note the folder that the base was read from, which means nothing elsewhere.
    peft_model.peft_config["default"].base_model_name_or_path = base_model
    return peft_model
