"""Attention as models call it: handed on to the step that runs.

transformers' models call whatever function their config names in `AttentionInterface`. Ours is told, through a context
variable, which step runs; everything about rows, blocks and positions stands in that step, so models run unchanged on
rows of many requests packed into one sequence.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from service.engine.operators import define_operator, module_of, number_of

ATTENTION = "dylora_packed"
"""The name under which our attention is registered with transformers."""

HARMLESS = frozenset({"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"})
"""Attention arguments that carry nothing which the step does not know already."""


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention call over packed rows."""

    query: Tensor  # [heads, rows, head_dim]
    key: Tensor  # [kv_heads, rows, head_dim]
    value: Tensor  # [kv_heads, rows, value_dim]
    scale: float
    window: int | None
    softcap: float | None


class AttentionStep(Protocol):
    """What the registered attention function asks of the step that runs."""

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """The attention's output, [rows, heads, value_dim]."""


def current_attention() -> AttentionStep:
    """The attention of the step that runs."""
    return _step.get()


class UnsupportedAttention(Exception):
    """The model passes its attention something that packed rows can't honour."""


_step: ContextVar[AttentionStep] = ContextVar("attention_step")


@contextmanager
def attention_step(step: AttentionStep) -> Iterator[None]:
    """Let every attention call inside the block go to `step`."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def _packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, rows, head_dim]
    key: Tensor,  # [1, kv_heads, rows, head_dim]
    value: Tensor,  # [1, kv_heads, rows, value_dim]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    unknown = sorted(k for k, given in others.items() if given is not None and given is not False and k not in HARMLESS)
    if unknown or attention_mask is not None:
        raise UnsupportedAttention(f"its attention needs {', '.join(unknown) or 'a mask of its own'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if torch.compiler.is_compiling():
        return _attend_operator(query, key, value, module.dylora_number, scale, sliding_window or 0, softcap or 0.0), None
    call = AttentionCall(query[0], key[0], value[0], scale, sliding_window or None, softcap or None)
    return _step.get().attend(module, call).unsqueeze(0), None


def number_layers(layers: Iterable[nn.Module]) -> None:
    """Let compiled graphs tell attention layers apart. Before any of them is compiled."""
    for layer in layers:
        layer.dylora_number = number_of(layer)


def _attend(query: Tensor, key: Tensor, value: Tensor, number: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    call = AttentionCall(query[0], key[0], value[0], scale, window or None, softcap or None)
    return _step.get().attend(module_of(number), call).unsqueeze(0)


# It writes to the cache, which no graph sees, and so cannot reorder.
_attend_operator = define_operator(
    "attend",
    "(Tensor query, Tensor key, Tensor value, Tensor number, float scale, int window, float softcap) -> Tensor",
    _attend,
    lambda query, key, value, *_: query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]),
)


def _no_mask(*_: Any, **__: Any) -> None:
    """Causality is the step's own business. Unregistered, a model may build a dense [rows, rows] mask, or none at all."""


AttentionInterface.register(ATTENTION, _packed_attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)
