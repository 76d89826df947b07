"""The keys and values of all running sequences, and the attention that reads them.

transformers' models call whatever function their config names in `AttentionInterface`. Ours is told, through a context
variable, which step runs; everything about rows, blocks and positions stands in that step, so models run unchanged on
rows of many requests packed into one sequence.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION = "dylora_packed"
"""The name under which our attention is registered with transformers."""

HARMLESS = frozenset({"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"})
"""Attention arguments that carry nothing which the step does not know already."""


@dataclass(frozen=True)
class LayerShape:
    """One attention layer's part of the cache."""

    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    """How many tokens back a row sees, itself included; None: all."""


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
    call = AttentionCall(query[0], key[0], value[0], scale, sliding_window or None, softcap or None)
    return _step.get().attend(module, call).unsqueeze(0), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Causality is the step's own business. Unregistered, a model may build a dense [rows, rows] mask, or none at all."""


AttentionInterface.register(ATTENTION, _packed_attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


@dataclass(frozen=True)
class Span:
    """One sequence's rows in a step."""

    start: int
    """Position in its sequence of the first row."""
    length: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        """Position after its last row: the number of keys that its last row sees."""
        return self.start + self.length


class KVCache:
    """Paged keys and values: per layer one tensor of token slots, cut into blocks by the scheduler's bookkeeping."""

    def __init__(
        self,
        layers: Mapping[nn.Module, LayerShape],
        *,
        total_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_tokens = block_tokens
        self.device = device
        slots = total_blocks * block_tokens
        # Zeros, not garbage: padded positions are read and weighted with 0, and 0 * NaN is NaN.
        self._layers = {
            module: (
                torch.zeros(slots, shape.kv_heads, shape.head_dim, dtype=dtype, device=device),
                torch.zeros(slots, shape.kv_heads, shape.value_dim, dtype=dtype, device=device),
            )
            for module, shape in layers.items()
        }

    @staticmethod
    def token_bytes(layers: Mapping[nn.Module, LayerShape], dtype: torch.dtype) -> int:
        """Bytes that one token occupies over all layers."""
        return sum(shape.kv_heads * (shape.head_dim + shape.value_dim) for shape in layers.values()) * dtype.itemsize

    def plan(self, spans: Sequence[Span]) -> "PagedAttention":
        """Lay out one step's rows, packed in the order of `spans`."""
        return PagedAttention(self._layers, self.block_tokens, spans, self.device)


class PagedAttention:
    """One step's attention: writes the rows' keys and values to their slots, then lets each row see its own sequence.

    Rows of length-1 spans (decode) are attended together, padded to the longest context among them; longer spans
    (prefill chunks) one after the other.
    """

    def __init__(
        self,
        layers: Mapping[nn.Module, tuple[Tensor, Tensor]],
        block_tokens: int,
        spans: Sequence[Span],
        device: torch.device,
    ) -> None:
        self._layers = layers
        self._write_slots = torch.cat([_slots(span, block_tokens)[span.start :] for span in spans]).to(device)  # [rows]
        self._prefills: list[tuple[int, Span, Tensor]] = []
        decode_rows: list[int] = []
        decode_spans: list[Span] = []
        row = 0
        for span in spans:
            if span.length == 1:
                decode_rows.append(row)
                decode_spans.append(span)
            else:
                self._prefills.append((row, span, _slots(span, block_tokens).to(device)))
            row += span.length
        self._decode_rows = torch.tensor(decode_rows, device=device)  # [decodes]
        self._all_decode = not self._prefills
        self._ends = torch.tensor([span.end for span in decode_spans], device=device)  # [decodes]
        if decode_spans:
            self._decode_slots = nn.utils.rnn.pad_sequence(
                [_slots(span, block_tokens) for span in decode_spans], batch_first=True
            ).to(device)  # [decodes, longest]
        self._decode_masks: dict[int | None, Tensor] = {}

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """Output of one layer, [rows, heads, value_dim]."""
        keys, values = self._layers[module]  # [slots, kv_heads, dim]
        keys.index_copy_(0, self._write_slots, call.key.transpose(0, 1).to(keys.dtype))
        values.index_copy_(0, self._write_slots, call.value.transpose(0, 1).to(values.dtype))
        if self._all_decode:
            return self._decode(call.query.transpose(0, 1), keys, values, call)
        heads, rows, _ = call.query.shape
        out = call.query.new_empty(rows, heads, call.value.shape[-1])
        if len(self._decode_rows):
            query = call.query[:, self._decode_rows].transpose(0, 1)
            out[self._decode_rows] = self._decode(query, keys, values, call)
        for row, span, slots in self._prefills:
            end = row + span.length
            query = call.query[None, :, row:end]  # [1, heads, length, dim]
            seen_keys = keys[slots].transpose(0, 1).unsqueeze(0)  # [1, kv_heads, end, dim]
            seen_values = values[slots].transpose(0, 1).unsqueeze(0)
            mask = _causal_mask(span, call.window, query.device)
            out[row:end] = _attention(query, seen_keys, seen_values, mask, call)[0].transpose(0, 1)
        return out

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, call: AttentionCall) -> Tensor:
        """`query` is [decodes, heads, dim]; the result [decodes, heads, value_dim]."""
        seen_keys = keys[self._decode_slots].transpose(1, 2)  # [decodes, kv_heads, longest, dim]
        seen_values = values[self._decode_slots].transpose(1, 2)
        return _attention(query.unsqueeze(2), seen_keys, seen_values, self._decode_mask(call.window), call).squeeze(2)

    def _decode_mask(self, window: int | None) -> Tensor:
        """True where a decode row may look, [decodes, 1, 1, longest]; built once a step for each window size in use."""
        mask = self._decode_masks.get(window)
        if mask is None:
            position = torch.arange(self._decode_slots.shape[1], device=self._ends.device)
            mask = position < self._ends[:, None]
            if window is not None:
                mask &= position >= self._ends[:, None] - window
            mask = mask[:, None, None, :]
            self._decode_masks[window] = mask
        return mask


def _slots(span: Span, block_tokens: int) -> Tensor:
    """Slots of a sequence's tokens 0..end-1, [end]."""
    blocks = torch.tensor(span.blocks, dtype=torch.long)
    return (blocks[:, None] * block_tokens + torch.arange(block_tokens)).flatten()[: span.end]


def _causal_mask(span: Span, window: int | None, device: torch.device) -> Tensor:
    """True where a chunk's row may look, [length, end]."""
    rows = torch.arange(span.start, span.end, device=device)[:, None]
    seen = torch.arange(span.end, device=device)
    mask = seen <= rows
    return mask if window is None else mask & (seen > rows - window)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, call: AttentionCall) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads; [batch, heads, queries, dim] in and out."""
    groups = query.shape[1] // key.shape[1]
    if call.softcap is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=call.scale, enable_gqa=groups > 1
        )
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = call.softcap * torch.tanh(query @ key.transpose(-1, -2) * (call.scale / call.softcap))
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype)
    return weights @ value
