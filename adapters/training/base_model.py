"""The base of a training: loaded for its task, in full precision or packed by bitsandbytes, with its tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from adapters.data.example import Task
from adapters.errors import TrainingError
from adapters.pretrained_model import Loaded, load_config, load_pretrained, load_tokenizer, refused
from adapters.training.heads import modules_to_train
from adapters.training.padding import set_padding

_CLASSIFIER_PARTS = r"(.*\.)?(classifier|score|pre_classifier|head|pooler)"
"""Pattern of the paths that a base's checkpoint may lack: they are to be trained, so they can't be packed."""


@dataclass(frozen=True)
class Base:
    """A model to adapt.

    Attributes:
        model: for its task.
        tokenizer: its own.
        missing: names of the parameters that the checkpoint lacked, so that they are random now.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Precision:
    """How the base's weights are held; the factors are float32 in any case.

    Attributes:
        bf16: in bfloat16, else in float32.
        load_in_4bit: packed in NF4 with double quantisation (arXiv 2305.14314), computing in what `bf16` says.
        load_in_8bit: packed in int8 (arXiv 2208.07339).
    """

    bf16: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False

    def loading_options(self, device: torch.device, left_alone: str | None) -> dict[str, Any]:
        """Arguments for `from_pretrained`.

        Args:
            device: where packed weights go.
            left_alone: pattern of the paths of modules that are not packed; output heads unless given.

        Raises:
            TrainingError: bitsandbytes is needed and isn't there, or both ways of packing are asked for.
        """
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        if not (self.load_in_4bit or self.load_in_8bit):
            return {"dtype": dtype}
        if self.load_in_4bit and self.load_in_8bit:
            raise TrainingError("load_in_4bit and load_in_8bit are both given; choose one of them")
        if find_spec("bitsandbytes") is None:
            raise TrainingError(
                "load_in_4bit and load_in_8bit need bitsandbytes, which is not installed: "
                "pip install 'dylora-serve[train,quantized]'"
            )
        packed = BitsAndBytesConfig(
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=None if left_alone is None else [left_alone],  # in 4 bits too
        )
        return {"dtype": dtype, "quantization_config": packed, "device_map": {"": device}}


def load_base(
    name: str,
    task: Task,
    labels: Sequence[str] = (),
    *,
    precision: Precision,
    device: torch.device,
    seed: int = 0,
) -> Base:
    """Load a model for `task`, and its tokenizer.

    Args:
        name: a folder, or a name on the Hugging Face hub.
        labels: a classifier's classes, in order.
        device: where a packed model goes; any other is left to Trainer.
        seed: of a classifier's new head.

    Raises:
        TrainingError: it can't be loaded, is not made for the task, or lacks weights.
    """
    options = precision.loading_options(device, _CLASSIFIER_PARTS if task is Task.CLASSIFICATION else None)
    torch.manual_seed(seed)
    with refused(f"model {name!r} can't be loaded for {task}", TrainingError):
        tokenizer = load_tokenizer(name)
        if task is Task.CLASSIFICATION:
            loaded = load_pretrained(AutoModelForSequenceClassification, name, **_classes(labels), **options)
        else:
            _refuse_encoder(name)
            loaded = load_pretrained(AutoModelForCausalLM, name, **options)
    _refuse_random_weights(name, task, loaded)
    set_padding(loaded.model, tokenizer)
    return Base(loaded.model, tokenizer, loaded.missing)


def _classes(labels: Sequence[str]) -> dict[str, Any]:
    """What the config of a classifier says of them."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def _refuse_encoder(name: str) -> None:
    config = load_config(name)
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise ValueError(f"{config.model_type} reads both ways; causal data needs a model that predicts the next token")


def _refuse_random_weights(name: str, task: Task, loaded: Loaded) -> None:
    """What is random must be trained and saved with the adapter, and only a classifier's new parts are."""
    whole = modules_to_train(loaded.model, loaded.missing)
    lost = [key for key in loaded.random if not any(key.startswith(path + ".") for path in whole)]
    if lost:
        shown = ", ".join(sorted(lost)[:3]) + (", ..." if len(lost) > 3 else "")
        raise TrainingError(f"model {name!r} lacks {len(lost)} of the weights that {task} needs, or has others: {shown}")
