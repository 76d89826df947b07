"""The nested LoRA layer for training: one pair of factors that is used at whatever rank is selected."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.adapter import Adapter, LowRank
from adapters.config import AdapterConfig
from adapters.errors import InvalidAdapter
from adapters.training.dylora import ALL_LINEAR, UpdateRule

OUTPUT_HEADS = frozenset({"lm_head"})
"""Modules that are never adapted, by name, besides the one that a model says is its head: they may share their weight with the
input embedding."""


class NestedLoRA(nn.Module):
    """A frozen linear module with a nested update: `W0 x + scale(b) * B[:, :b] A[:b] x` at rank b.

    Rank b is exactly b rows of A and b columns of B (arXiv 2210.07558, section 4.1; the authors' released code takes
    b + 1). A starts Kaiming uniform with a = sqrt(5), as theirs does, times `init_scale`, and B at zero, so that a new layer
    changes nothing. The factors are float32 whatever the base's weights are: half precision, or packed by bitsandbytes.

    Attributes:
        rank: the selected rank, r_max at first.
        update: which rows of A and columns of B get a gradient at the selected rank.
        row_scales: [rows, 1, r_max] where each row of the batch has a rank of its own: scale(b) in its first b columns,
            0 in the others. None where all rows are at `rank`.
    """

    row_scales: Tensor | None

    def __init__(self, base: nn.Linear | Conv1D, config: AdapterConfig, dropout: float = 0.0, init_scale: float = 1.0) -> None:
        super().__init__()
        in_features, out_features = _features(base)
        device = base.weight.device
        self.base = base.requires_grad_(False)
        self.config = config
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_a = nn.Parameter(torch.empty(config.r_max, in_features, device=device, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.zeros(out_features, config.r_max, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.lora_a.data.mul_(init_scale)
        self.rank = config.r_max
        self.update = UpdateRule.FULL
        self.row_scales = None

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., in] to [..., out] at the selected rank.

        Where each row has its own, `x` is [rows, tokens, in], or [rows * tokens, in], row by row.

        Raises:
            InvalidAdapter: `x` is neither, so that it can't be told which row has which rank.
        """
        a, b = self._selected()
        low = functional.linear(self.dropout(x).to(a.dtype), a)  # [..., rank]
        scale = self.config.scale(self.rank)
        if self.row_scales is not None:
            low, scale = low * _spread(self.row_scales, low.shape), 1.0
        update = functional.linear(low, b)  # [..., out]
        out: Tensor = self.base(x)
        return torch.add(out, update.to(out.dtype), alpha=scale)

    def _selected(self) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] at the selected rank, what the update rule leaves alone cut off from gradients.

        Where rows have ranks of their own, all of both: `row_scales` leaves out what a row doesn't use.
        """
        if self.row_scales is not None:
            return self.lora_a, self.lora_b
        a, b = self.lora_a[: self.rank], self.lora_b[:, : self.rank]
        first, _ = self.update.rows(self.rank)
        if not (first and self.training):
            return a, b
        return torch.cat((a[:first].detach(), a[first:])), torch.cat((b[:, :first].detach(), b[:, first:]), dim=1)


def _spread(row_scales: Tensor, shape: torch.Size) -> Tensor:
    """`row_scales` [rows, 1, r_max] in a form that fits `shape`: some models flatten rows and tokens into one dimension."""
    rows = row_scales.shape[0]
    if len(shape) == 3 and shape[0] == rows:
        return row_scales
    if len(shape) == 2 and shape[0] % rows == 0:
        return row_scales.squeeze(1).repeat_interleave(shape[0] // rows, dim=0)  # [rows * tokens, r_max]
    raise InvalidAdapter(
        [f"a linear layer's input has the shape {tuple(shape[:-1])} for {rows} rows: train with one rank per step"]
    )


def inject(
    model: nn.Module,
    config: AdapterConfig,
    targets: Sequence[str] | str = ALL_LINEAR,
    dropout: float = 0.0,
    trained_whole: Sequence[str] = (),
    init_scale: float = 1.0,
) -> tuple[str, ...]:
    """Freeze `model` and put a NestedLoRA in the place of each target, in place.

    Args:
        model: any module tree of nn.Linear (also those of bitsandbytes) or transformers' Conv1D.
        config: kind DYLORA; its `scale` is what the layers use.
        targets: suffixes of module paths (`q_proj`, `self_attn.q_proj`), or "all-linear". An output head is never a
            target of "all-linear".
        dropout: probability, on the input of A.
        trained_whole: paths of modules that stay trainable as they are, and are no targets of "all-linear".
        init_scale: what A's first values are multiplied with.

    Returns:
        the adapted paths, in the model's order.

    Raises:
        InvalidAdapter: a suffix matches nothing, or something that isn't linear, or there is no target at all; lists
            every offender.
    """
    paths = target_paths(model, targets, trained_whole)
    model.requires_grad_(False)
    for path in trained_whole:
        model.get_submodule(path).requires_grad_(True)
    for path in paths:
        parent, _, name = path.rpartition(".")
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear | Conv1D)  # target_paths let nothing else pass
        setattr(model.get_submodule(parent), name, NestedLoRA(base, config, dropout, init_scale))
    return paths


def target_paths(model: nn.Module, targets: Sequence[str] | str, trained_whole: Sequence[str] = ()) -> tuple[str, ...]:
    """The module paths that `targets` names; `inject` says what may be named, and what is raised."""
    modules = dict(model.named_modules())
    linear = [path for path, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    heads = {
        path
        for path, module in modules.items()
        if path.rpartition(".")[2] in OUTPUT_HEADS or module is output or _is_inside(path, trained_whole)
    }
    if targets == ALL_LINEAR:
        every = tuple(path for path in linear if path not in heads)
        if not every:
            raise InvalidAdapter([f"{type(model).__name__} has no linear layer to adapt (Linear or Conv1D)"])
        return every
    suffixes = (targets,) if isinstance(targets, str) else tuple(targets)
    chosen = [path for path in modules if any(_ends_with(path, suffix) for suffix in suffixes)]
    problems = [f"target {s!r} matches no module" for s in suffixes if not any(_ends_with(p, s) for p in modules)]
    problems += [f"{p} is {type(modules[p]).__name__}, not Linear or Conv1D" for p in chosen if p not in linear]
    problems += [f"{p} is an output head" for p in chosen if p in heads]
    if problems:
        raise InvalidAdapter(problems)
    return tuple(chosen)


def nested_layers(model: nn.Module) -> Iterator[tuple[str, NestedLoRA]]:
    """Every NestedLoRA in `model` with its path."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, NestedLoRA))


def set_rank(model: nn.Module, rank: int) -> None:
    """Select `rank` in every layer.

    Raises:
        IllegalRank: the adapter does not have it; no layer is changed then.
    """
    layers = [layer for _, layer in nested_layers(model)]
    for layer in layers:
        layer.config.check_rank(rank)
    for layer in layers:
        layer.rank, layer.row_scales = rank, None


def set_row_ranks(layers: Sequence[NestedLoRA], ranks: Sequence[int]) -> None:
    """Select a rank for each row of the batch that follows, in all `layers`, until `set_rank` or this is called again.

    Raises:
        IllegalRank: the adapter does not have one of them; no layer is changed then.
    """
    made: dict[tuple[AdapterConfig, torch.device, torch.dtype], Tensor] = {}  # the layers of a model share one
    for layer in layers:
        a = layer.lora_a
        key = (layer.config, a.device, a.dtype)
        if key not in made:
            made[key] = _row_scales(layer.config, ranks).to(a.device, a.dtype)
    for layer in layers:
        layer.row_scales = made[(layer.config, layer.lora_a.device, layer.lora_a.dtype)]


def _row_scales(config: AdapterConfig, ranks: Sequence[int]) -> Tensor:
    rows = [[config.scale(rank)] * rank + [0.0] * (config.r_max - rank) for rank in ranks]
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(1)  # [rows, 1, r_max]


def factors(model: nn.Module) -> dict[str, Tensor]:
    """The trainable factors by parameter name, detached: `<path>.lora_a` [r_max, in], `<path>.lora_b` [out, r_max]."""
    return {
        f"{path}.{name}": parameter.detach()
        for path, layer in nested_layers(model)
        for name, parameter in (("lora_a", layer.lora_a), ("lora_b", layer.lora_b))
    }


def read_adapter(model: nn.Module, config: AdapterConfig) -> Adapter:
    """Copy the factors out as an Adapter."""
    modules = {
        path: LowRank(layer.lora_a.detach().clone(), layer.lora_b.detach().clone()) for path, layer in nested_layers(model)
    }
    return Adapter(config, modules)


@torch.no_grad()
def write_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Put a NestedLoRA with `adapter`'s factors into a fresh `model`, for evaluating it.

    Raises:
        InvalidAdapter: a module of the adapter is missing in the model or has another shape; lists every offender.
    """
    paths = set(dict(model.named_modules()))
    problems = [f"{path} is not a module of the model" for path in adapter.modules if path not in paths]
    if problems:
        raise InvalidAdapter(problems)
    inject(model, adapter.config, tuple(adapter.modules))
    parameters = dict(model.named_parameters())
    for name, value in adapter.saved_modules.items():
        if name not in parameters or parameters[name].shape != value.shape:
            problems.append(f"{name} of shape {tuple(value.shape)} is not a parameter of the model")
            continue
        parameters[name].copy_(value)
    for path, layer in nested_layers(model):
        low_rank = adapter.modules[path]
        found, expected = (low_rank.a.shape, low_rank.b.shape), (layer.lora_a.shape, layer.lora_b.shape)
        if found != expected:
            problems.append(f"{path} has factors of shapes {found}, not {expected}")
            continue
        layer.lora_a.copy_(low_rank.a)
        layer.lora_b.copy_(low_rank.b)
    if problems:
        raise InvalidAdapter(problems)


def _ends_with(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith("." + suffix)


def _is_inside(path: str, modules: Sequence[str]) -> bool:
    return any(path == module or path.startswith(module + ".") for module in modules)


def _features(base: nn.Linear | Conv1D) -> tuple[int, int]:
    """(in, out) of a linear module; Conv1D holds its weight transposed, [in, out]."""
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    in_features, out_features = base.weight.shape
    return in_features, out_features
