"""A base model and an adapter at one rank, written as one ordinary transformers model."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from adapters.adapter import Adapter, LowRank
from adapters.errors import AdapterError
from adapters.merge import check_fits, merge, replace_parameters
from adapters.pretrained_model import load_config, load_for, load_tokenizer, quiet, refused
from adapters.training.padding import set_padding

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types, and the class that has the head of each."""

_TOLERANCE = 1e-3
"""Largest difference of outputs, as a share of the largest output, that float32 rounding is taken for."""


def export_merged(adapter: Adapter, rank: int, base: str, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write model, config and tokenizer to `folder`, for any reader of transformers' models.

    Merged in float32, which takes 4 bytes per parameter of memory, and rounded once. Checked twice: the merged model's outputs
    against the base's with the adapter beside it, and what the written files load as against what was written.

    Args:
        adapter: any kind.
        rank: one of its ranks.
        base: folder or hub name of the base model. Only safetensors are read, and no code that comes with it is run.
        folder: exists, empty.
        dtype: of the written weights; as the base has them unless given.

    Raises:
        IllegalRank: the adapter does not have this rank.
        InvalidAdapter: it does not fit the base.
        AdapterError: the base can't be loaded, is quantised, or the merged model fails a check.
    """
    adapter.config.check_rank(rank)
    model = load_base(base, adapter)
    check_fits(model, adapter)
    if adapter.config.labels:
        model.config.id2label = dict(enumerate(adapter.config.labels))
        model.config.label2id = {label: i for i, label in enumerate(adapter.config.labels)}
    dtypes = {name: tensor.dtype for name, tensor in _numbers(model)}
    usual_dtype = model.dtype
    for _, tensor in _numbers(model):
        tensor.data = tensor.data.float()
    _merge_checked(model, adapter, rank)
    saved = set(model.state_dict())
    for name, tensor in _numbers(model):
        if name in saved:
            tensor.data = tensor.data.to(dtype or dtypes.get(name, usual_dtype))  # what was untied has a new name
            if not tensor.isfinite().all():
                raise AdapterError(f"{name}: too large for {str(tensor.dtype).removeprefix('torch.')}; choose another dtype")
    with quiet(), refused(f"the merged model of {base!r} can't be written"):
        tokenizer = _tokenizer_of(base)
        if tokenizer is not None:
            set_padding(model, tokenizer)
            tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    kind, expected = type(model), _digests(model)
    del model  # two copies of a large model need not fit into memory
    with quiet(), refused(f"the merged model of {base!r} can't be read back"):
        found = _digests(kind.from_pretrained(folder, dtype="auto", use_safetensors=True))
    changed = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if changed:
        names = ", ".join(changed[:5])
        raise AdapterError(f"model {base!r} can't hold merged weights: read back, {names} differ (tied in a way of its own?)")


def _merge_checked(model: PreTrainedModel, adapter: Adapter, rank: int) -> None:
    """Merge, and compare with the base beside the adapter: a weight that the model uses in a way of its own shows."""
    expected = _outputs_beside(model, adapter, rank)
    merge(model, adapter, rank)
    difference = (expected - _outputs(model)).abs().max().item()
    if not difference <= _TOLERANCE * max(1.0, expected.abs().max().item()):
        raise AdapterError(f"merged, the model differs from base and adapter side by side, by {difference:.3g} in an output")


def _digests(model: nn.Module) -> dict[str, bytes]:
    """SHA-256 of every saved tensor's values, whatever number type they lie in."""
    return {
        name: hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).digest()
        for name, tensor in model.state_dict().items()
    }


def load_base(name: str, adapter: Adapter) -> PreTrainedModel:
    """The base model with the head that the adapter's task needs, in eval mode, in the dtype it is stored in.

    A classifier is made as large as the one that the adapter brings.

    Raises:
        AdapterError: it can't be loaded, or is quantised.
        InvalidAdapter: it lacks weights that the adapter does not bring either.
    """
    with quiet(), refused(f"model {name!r} can't be loaded"):
        config = load_config(name)
    if getattr(config, "quantization_config", None) is not None:
        raise AdapterError(
            f"model {name!r} is quantised, and what is rounded to a few bits takes no small update: merge into the model that "
            "it was made from, then quantise the result"
        )
    loader = _class_for(name, config, adapter)
    with quiet(), refused(f"model {name!r} can't be loaded"):
        _size_head(config, loader, adapter)
        return load_for(adapter, loader, name, config).model


def _class_for(name: str, config: Any, adapter: Adapter) -> Any:
    """transformers' class for the adapter's task; without a task, the one that the base was saved as."""
    task = str(adapter.training.get("task_type"))
    if task in _AUTO_CLASSES:
        return getattr(transformers, _AUTO_CLASSES[task])
    architecture = next(iter(getattr(config, "architectures", None) or ()), "")
    found = getattr(transformers, architecture, None) if architecture else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise AdapterError(f"model {name!r}: its config names no architecture of transformers, but {architecture or None!r}")
    return found


def _size_head(config: Any, loader: Any, adapter: Adapter) -> None:
    """Set the number of labels from the head that the adapter brings: the base's config knows nothing of it."""
    if not adapter.saved_modules:
        return
    with torch.device("meta"):
        skeleton = loader.from_config(config) if hasattr(loader, "from_config") else loader(config)
    own = dict(skeleton.named_parameters(remove_duplicate=False))
    for name, value in adapter.saved_modules.items():
        there = own.get(name)
        if there is None or there.shape == value.shape or there.shape[1:] != value.shape[1:]:
            continue
        if there.shape[0] == config.num_labels:
            config.num_labels = value.shape[0]
            return


def _outputs_beside(model: PreTrainedModel, adapter: Adapter, rank: int) -> Tensor:
    """The outputs of the base with the adapter's products added to those of its modules; whole parameters are replaced."""
    replace_parameters(model, adapter)
    scale = adapter.config.scale(rank)
    hooks = [
        model.get_submodule(path).register_forward_hook(_addition(factors, rank, scale, adapter.lora_bias.get(path)))
        for path, factors in adapter.modules.items()
    ]
    try:
        return _outputs(model)
    finally:
        for hook in hooks:
            hook.remove()


def _addition(factors: LowRank, rank: int, scale: float, bias: Tensor | None) -> Any:
    a, b = factors.a[:rank].float(), factors.b[:, :rank].float()

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if factors.is_embedding:
            # Gemma's embedding multiplies what it looks up.
            return output + scale * float(getattr(module, "embed_scale", 1.0)) * (a.T[x] @ b.T)
        product = scale * (x @ a.T) @ b.T
        return output + (product if bias is None else product + bias.float())

    return add


def _outputs(model: PreTrainedModel) -> Tensor:
    """What the model says to a few tokens, in float32: logits, or its last hidden state."""
    tokens = {name: value[:1] for name, value in model.dummy_inputs.items()}  # one row: some heads need padding for more
    with torch.no_grad():
        found = model(**tokens)
    output: Tensor = found[0]
    return output.float()


def _numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that hold numbers, not indices."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            yield name, tensor


def _tokenizer_of(base: str) -> PreTrainedTokenizerBase | None:
    """The base's own, if it has one."""
    try:
        tokenizer = load_tokenizer(base)
    except (OSError, ValueError, KeyError):
        return None
    # Where its files are missing, transformers may make up a tokenizer without words from the model's type.
    is_there = any(_has_file(base, name) for name in tokenizer.vocab_files_names.values())
    return tokenizer if is_there else None


def _has_file(base: str, name: str) -> bool:
    try:
        return cached_file(base, name) is not None
    except OSError:
        return False
