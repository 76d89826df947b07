"""Adding an adapter to the weights of its base model at one rank, so that nothing of it is left to compute."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from adapters.adapter import Adapter, LowRank
from adapters.checkpoint.peft_inventory import is_listed
from adapters.errors import InvalidAdapter


def merge(model: nn.Module, adapter: Adapter, rank: int) -> None:
    """Change `model` in place into one that computes what it computes with the adapter at `rank`.

    `W + scale(rank) * B[:, :rank] @ A[:rank]` for every module, in float32 and rounded once to the weight's own dtype. A
    weight that the model uses in two places (tied embeddings) gets a copy of its own where only one of them is adapted, and
    the config of a transformers model then says so. That is what PEFT computes with the adapter beside the model; its own
    merge_and_unload changes both places.

    Raises:
        IllegalRank: the adapter does not have this rank.
        InvalidAdapter: it does not fit the model, or the sum is too large for a weight's dtype; with all offenders.
    """
    scale = adapter.config.scale(rank)
    check_fits(model, adapter)
    replace_parameters(model, adapter)
    overflown = []
    for path, factors in tqdm(adapter.modules.items(), desc="merging", unit="module", disable=None, leave=False):
        module = model.get_submodule(path)
        weight = _own_parameter(model, path, "weight")
        summed = torch.add(weight.float(), weight_update(module, factors, rank), alpha=scale).to(weight.dtype)
        if not summed.isfinite().all():
            overflown.append(f"{path}: with its update it is too large for {str(weight.dtype).removeprefix('torch.')}")
        weight.data.copy_(summed)
    for path, bias in adapter.lora_bias.items():
        own = _own_parameter(model, path, "bias")
        own.data.copy_(own.float() + bias.to(own.device, torch.float32))
    if overflown:
        raise InvalidAdapter(overflown)


def replace_parameters(model: nn.Module, adapter: Adapter) -> None:
    """Put the adapter's whole parameters (biases, saved modules) in the place of the model's, in the model's dtype."""
    for path, bias in adapter.base_bias.items():
        _own_parameter(model, path, "bias").data.copy_(bias)
    listed = adapter.training.get("modules_to_save")
    for name, value in adapter.saved_modules.items():
        path, _, leaf = name.rpartition(".")
        # PEFT copies a listed module; an embedding that it saved unlisted is the base's own, which what is tied to it follows.
        is_copy = isinstance(listed, list | tuple) and is_listed(path, [str(each) for each in listed])
        parameter = _own_parameter(model, path, leaf) if is_copy else model.get_parameter(name)
        parameter.data.copy_(value)


def weight_update(module: nn.Module, factors: LowRank, rank: int) -> Tensor:
    """`B[:, :rank] @ A[:rank]` in float32, on the device and in the layout of the module's weight.

    nn.Linear stores [out, in]; Conv1D (GPT-2) [in, out]; nn.Embedding [tokens, features], which is [in, out] here.
    """
    device = module.get_parameter("weight").device
    a = factors.a[:rank].to(device, torch.float32)  # [rank, in]
    b = factors.b[:, :rank].to(device, torch.float32)  # [out, rank]
    return b @ a if isinstance(module, nn.Linear) else (b @ a).T


def check_fits(model: nn.Module, adapter: Adapter, *, adds_biases: bool = False) -> None:
    """Compare names and shapes; a model's name is not looked at.

    Args:
        adds_biases: LoRA's own biases may stand where the base model has none.

    Raises:
        InvalidAdapter: with every module and parameter that does not fit.
    """
    biases = adapter.base_bias if adds_biases else {**adapter.lora_bias, **adapter.base_bias}
    problems = [*_unfit_modules(model, adapter), *_unfit_parameters(model, biases, adapter.saved_modules)]
    if problems:
        raise InvalidAdapter(problems)


def _unfit_modules(model: nn.Module, adapter: Adapter) -> Iterator[str]:
    modules = dict(model.named_modules())
    for path, factors in adapter.modules.items():
        module = modules.get(path)
        wanted = nn.Embedding if factors.is_embedding else nn.Linear | Conv1D
        if module is None:
            yield f"{path}: the base model has no such module"
        elif not isinstance(module, wanted):
            yield f"{path}: the base model's {type(module).__name__} can't take this low-rank update"
        elif not module.get_parameter("weight").is_floating_point():
            yield f"{path}: its weight is quantised, to which no update can be added"
        else:
            needed = tuple(module.get_parameter("weight").shape)  # [out, in] in the layout of nn.Linear
            needed = needed if isinstance(module, nn.Linear) else needed[::-1]
            given = (factors.b.shape[0], factors.a.shape[1])
            if given != needed:
                yield f"{path}: made for out, in = {given}, the base model has {needed}"


def _unfit_parameters(model: nn.Module, biases: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> Iterator[str]:
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, value in ({f"{path}.bias": bias for path, bias in biases.items()} | dict(saved)).items():
        if name not in own:
            yield f"{name}: the base model has no such parameter"
        elif own[name].shape != value.shape:
            is_resized = value.ndim == 2 and value.shape[1:] == own[name].shape[1:]
            hint = " (was its vocabulary resized? then resize the base model first)" if is_resized else ""
            yield f"{name}: has shape {list(value.shape)}, the base model {list(own[name].shape)}{hint}"


def _own_parameter(model: nn.Module, path: str, leaf: str) -> nn.Parameter:
    """The module's parameter, made its own first where the model uses it elsewhere, too."""
    module = model.get_submodule(path)
    parameter = module.get_parameter(leaf)
    uses = Counter(id(each) for _, each in model.named_parameters(remove_duplicate=False))
    if uses[id(parameter)] > 1:
        parameter = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(module, leaf, parameter)
        _note_untied(getattr(model, "config", None))
    return parameter


def _note_untied(config: Any) -> None:
    """transformers ties when it loads, if the config says so: by now it must not."""
    for each in (config, config.get_text_config()) if hasattr(config, "get_text_config") else ():
        each.tie_word_embeddings = False
