"""The modules that a classifier's adapter can't do without: they are trained whole, and saved with it."""

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

_CLASSIFIERS = frozenset(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())


def is_classifier(model: nn.Module) -> bool:
    """Whether the model is one of transformers' for sequence classification."""
    return type(model).__name__ in _CLASSIFIERS


def modules_to_train(model: PreTrainedModel, missing: Collection[str] = ()) -> tuple[str, ...]:
    """Paths of the modules to train whole; none unless the model is a classifier.

    These are its head (PEFT's convention: `classifier` or `score`), and whatever else the checkpoint of the base lacked, as
    one of a masked language model lacks BERT's pooler: its random values exist in this process alone, so an adapter that
    didn't bring them along would be of no use.

    Args:
        missing: names of the parameters that the checkpoint lacked.
    """
    if not is_classifier(model):
        return ()
    parts = [name for name, child in model.named_children() if name != model.base_model_prefix]
    head = [name for name in parts if any(True for _ in model.get_submodule(name).parameters())]
    owners = {name.rpartition(".")[0] for name in missing}
    return (*head, *sorted(path for path in owners if path.split(".")[0] not in head))
