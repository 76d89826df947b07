"""An ordinary LoRA by stock PEFT: what people bring along, for the server to re-nest."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from adapters.training.checkpoints import last_checkpoint
from adapters.training.encoding import EncodedPair
from adapters.training.settings import TrainSettings
from adapters.training.trainer import PairTrainer, padding_id


def train_stock_lora(
    model: PreTrainedModel,
    pairs: Sequence[EncodedPair],
    rank: int,
    alpha: int,
    settings: TrainSettings,
    checkpoints: Path,
    base_model: str,
) -> PeftModel:
    """Train LoRA of one rank on all linear layers with PEFT and Trainer.

    Returns:
        PEFT's model; its `save_pretrained` writes the checkpoint.
    """
    torch.manual_seed(settings.seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    # PEFT would note the folder that the base was read from, which means nothing elsewhere.
    peft_model.peft_config["default"].base_model_name_or_path = base_model
    trainer = PairTrainer(peft_model, pairs, settings, checkpoints, padding_id(model))
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    return peft_model
