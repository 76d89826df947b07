"""The base model that an adapter is measured on: found, and loaded with the head its task needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adapters.adapter import Adapter
from adapters.data.example import Corpus, Task
from adapters.demo import ARTIFACTS, BASE_NAME
from adapters.errors import AdapterError, DataError
from adapters.pretrained_model import load_config, load_for, load_tokenizer, quiet, refused
from adapters.training.padding import set_padding


@dataclass(frozen=True)
class BaseModel:
    """A base model in eval mode, and its tokenizer.

    Attributes:
        name: the folder's own name, or the hub's.
        has_own_head: whether all of its weights came with it: a classifier's head often comes with the adapter only.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    has_own_head: bool = True


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one. Raises AdapterError if torch has none such here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AdapterError(f"device: {name!r} is not a device of torch here; expected auto, cpu or cuda") from error
    return device


def base_name(model: Path | str | None, adapter: Adapter) -> str:
    """Where the base model is: `model` as given, else what the adapter's config names.

    Raises:
        AdapterError: neither is given, or it looks like a folder that is not there.
    """
    name = str(model) if model else adapter.config.base_model
    if not name:
        raise AdapterError("model: the adapter's config names no base model; give a folder or a hub name")
    if model is None and name == BASE_NAME:
        return str(ARTIFACTS / "base")
    is_folder_like = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not Path(name).is_dir() and is_folder_like:
        said = "" if model else "; the adapter's config names it, name another"
        raise AdapterError(f"model: {name} is not a folder{said}")
    return name


def load_base(name: str, adapter: Adapter, corpus: Corpus, *, device: torch.device, dtype: torch.dtype | None) -> BaseModel:
    """Load model and tokenizer.

    Args:
        name: a folder or a hub name.
        adapter: may bring the head of a classifier.
        corpus: its task says which head is needed, its labels how large it is.
        device: where to put it.
        dtype: of the weights; as they are stored if None.

    Raises:
        AdapterError: it can't be loaded.
        DataError: the adapter's head is of another number of classes.
        InvalidAdapter: the classifier has no trained head, neither in the base nor in the adapter.
    """
    is_classifier = corpus.task is Task.CLASSIFICATION
    loader: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    with quiet(), refused(f"model: {name} can't be loaded"):
        config = load_config(name)
        if is_classifier:
            config.num_labels = len(corpus.labels)
        tokenizer = load_tokenizer(name)
        loaded = load_for(adapter, loader, name, config, dtype)
    model = loaded.model
    set_padding(model, tokenizer)
    if is_classifier:
        _check_classes(model, adapter, corpus)
    model.to(device)
    shown = Path(name).resolve().name if Path(name).is_dir() else name
    return BaseModel(shown, model, tokenizer, has_own_head=not loaded.random)


def _check_classes(model: PreTrainedModel, adapter: Adapter, corpus: Corpus) -> None:
    """Raise DataError where the adapter's head is of another number of classes than the data."""
    for name, parameter in model.named_parameters():
        saved = adapter.saved_modules.get(name)
        is_head = parameter.shape[0] == len(corpus.labels) and saved is not None and saved.shape[1:] == parameter.shape[1:]
        if is_head and saved is not None and saved.shape[0] != len(corpus.labels):
            classes = f"{len(corpus.labels)} classes ({', '.join(corpus.labels)})"
            raise DataError(f"{corpus.source}: {classes}; the adapter's head {name} has {saved.shape[0]}")
