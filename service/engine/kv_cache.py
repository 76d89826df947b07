"""The keys and values of all running sequences, and the attention that reads them."""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from service.engine.attention import AttentionCall
from service.engine.native.kernels import LANES, PIECE_ROWS, Kernels, Seen

_SHORT_CONTEXT_TOKENS = 256


@dataclass(frozen=True)
class LayerShape:
    """One attention layer's part of the cache."""

    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    """How many tokens back a row sees, itself included; None: all."""


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


@dataclass(frozen=True)
class CacheRoom:
    """Room for keys and values: so many blocks of so many tokens in each of the layers."""

    layers: Mapping[nn.Module, LayerShape]
    total_blocks: int
    block_tokens: int
    dtype: torch.dtype
    device: torch.device

    def tensors(self, kernels: Kernels | None = None) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Each layer's keys and values, [blocks, block_tokens, kv_heads, dim]; in large pages by the kernels, if given."""

        def zeros(heads: int, dim: int) -> Tensor:
            shape = (self.total_blocks, self.block_tokens, heads, dim)
            held = torch.empty(shape, dtype=self.dtype, device=self.device)
            # Not garbage: padded positions are read and weighted with 0, and 0 * NaN is NaN.
            return (held if kernels is None else kernels.in_large_pages(held)).zero_()

        return {
            module: (zeros(shape.kv_heads, shape.head_dim), zeros(shape.kv_heads, shape.value_dim))
            for module, shape in self.layers.items()
        }


class KVCache:
    """Paged keys and values: per layer one tensor of token slots, cut into blocks by the scheduler's bookkeeping."""

    def __init__(self, room: CacheRoom, kernels: Kernels | None = None) -> None:
        """With `kernels`, they attend where they can."""
        self.block_tokens = room.block_tokens
        self.device = room.device
        dims = [dim for shape in room.layers.values() for dim in (shape.head_dim, shape.value_dim)]
        is_served = room.dtype is torch.float32 and room.device.type == "cpu" and not any(dim % LANES for dim in dims)
        self._kernels = kernels if is_served else None
        self._scratch = Scratch()
        self._layers = room.tensors(self._kernels)

    @staticmethod
    def token_bytes(layers: Mapping[nn.Module, LayerShape], dtype: torch.dtype) -> int:
        """Bytes that one token occupies over all layers."""
        return sum(shape.kv_heads * (shape.head_dim + shape.value_dim) for shape in layers.values()) * dtype.itemsize

    def plan(self, spans: Sequence[Span]) -> "PagedAttention | NativeAttention":
        """Lay out one step's rows, packed in the order of `spans`."""
        if self._kernels is not None:
            return NativeAttention(self._layers, self.block_tokens, spans, self._kernels)
        return PagedAttention(self._layers, self.block_tokens, spans, self.device, self._scratch)


class Scratch:
    """Memory that every layer of every step gathers into: fresh memory would cost as much in page faults as the copy."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this shape, and of the dtype and device of `like`; it lasts until `name` is taken again."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = like.new_empty(size)
            self._held[name] = held
        return held[:size].view(shape)


class NativeAttention:
    """One step's attention by the kernels: a prompt's rows in pieces that read its keys together, all others one by one."""

    def __init__(
        self,
        layers: Mapping[nn.Module, tuple[Tensor, Tensor]],
        block_tokens: int,
        spans: Sequence[Span],
        kernels: Kernels,
    ) -> None:
        self.layers = layers
        """Each layer's keys and values."""
        self.slots = torch.tensor([slot for span in spans for slot in slots_of(span, block_tokens)])
        """Where the rows' own keys and values go, [rows]."""
        self.end = max(span.end for span in spans)
        """The position after the last of all rows'."""
        self.seen = _seen(spans, block_tokens)
        """What each row sees."""
        self._kernels = kernels

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """Output of one layer, [rows, heads, value_dim]."""
        keys, values = self.layers[module]  # [blocks, block_tokens, kv_heads, dim]
        query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (call.query, call.key, call.value))
        self._kernels.write_cache(key, value, self.slots, keys, values)
        heads, rows, _ = query.shape
        out = query.new_empty(rows, heads, values.shape[-1])
        self._kernels.attend(query, keys, values, out, self.seen, window=call.window, scale=call.scale, softcap=call.softcap)
        return out


@dataclass(frozen=True)
class _DecodeGroup:
    """Decode rows that are attended together, padded to the longest context among them."""

    rows: Tensor  # [decodes], indices into the step's decode rows
    table: Tensor  # [decodes, most blocks]
    mask: Tensor  # [decodes, 1, 1, most blocks * block_tokens], True where a row may look


class PagedAttention:
    """One step's attention: writes the rows' keys and values to their slots, then lets each row see its own sequence.

    Rows of length-1 spans (decode) are attended together in groups of like length, so that a long context does not cost
    those beside it; longer spans (prefill chunks) one after the other. A layer with a window reads only the blocks that
    hold it.
    """

    def __init__(
        self,
        layers: Mapping[nn.Module, tuple[Tensor, Tensor]],
        block_tokens: int,
        spans: Sequence[Span],
        device: torch.device,
        scratch: "Scratch",
    ) -> None:
        self._layers = layers
        self._block_tokens = block_tokens
        self._device = device
        self._scratch = scratch
        slots = [slot for span in spans for slot in slots_of(span, block_tokens)]
        self._write_slots = torch.tensor(slots, device=device)  # [rows]
        self._prefills: list[tuple[int, Span]] = []
        self._decodes: list[Span] = []
        decode_rows: list[int] = []
        row = 0
        for span in spans:
            if span.length == 1:
                decode_rows.append(row)
                self._decodes.append(span)
            else:
                self._prefills.append((row, span))
            row += span.length
        self._decode_rows = torch.tensor(decode_rows, device=device)  # [decodes]
        # Layers with the same window share these; built by the first of them.
        self._groups: dict[int | None, list[_DecodeGroup]] = {}
        self._chunks: dict[int | None, list[tuple[Tensor, Tensor]]] = {}

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """Output of one layer, [rows, heads, value_dim]."""
        keys, values = self._layers[module]  # [blocks, block_tokens, kv_heads, dim]
        keys.flatten(0, 1).index_copy_(0, self._write_slots, call.key.transpose(0, 1).to(keys.dtype))
        values.flatten(0, 1).index_copy_(0, self._write_slots, call.value.transpose(0, 1).to(values.dtype))
        if not self._prefills:
            return self._decode(call.query.transpose(0, 1), keys, values, call)
        heads, rows, _ = call.query.shape
        out = call.query.new_empty(rows, heads, call.value.shape[-1])
        if self._decodes:
            query = call.query[:, self._decode_rows].transpose(0, 1)
            out[self._decode_rows] = self._decode(query, keys, values, call)
        self._prefill(out, keys, values, call)
        return out

    def _prefill(self, out: Tensor, keys: Tensor, values: Tensor, call: AttentionCall) -> None:
        """Attention of the prefill chunks, written to their rows of `out` [rows, heads, value_dim]."""
        for (row, span), (table, mask) in zip(self._prefills, self._prefill_views(call.window), strict=True):
            end = row + span.length
            query = call.query[None, :, row:end]  # [1, heads, length, dim]
            seen_keys, seen_values = self._gather("keys", keys, table), self._gather("values", values, table)
            out[row:end] = _attention(query, seen_keys, seen_values, mask, call)[0].transpose(0, 1)

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, call: AttentionCall) -> Tensor:
        """`query` is [decodes, heads, dim]; the result [decodes, heads, value_dim]."""
        groups = self._decode_groups(call.window)
        if len(groups) == 1:
            return self._decode_group(query, keys, values, groups[0], call)
        out = query.new_empty(*query.shape[:2], call.value.shape[-1])
        for group in groups:
            out[group.rows] = self._decode_group(query[group.rows], keys, values, group, call)
        return out

    def _decode_group(self, query: Tensor, keys: Tensor, values: Tensor, group: _DecodeGroup, call: AttentionCall) -> Tensor:
        seen_keys, seen_values = self._gather("keys", keys, group.table), self._gather("values", values, group.table)
        # The query heads that share a key/value head see the same keys: as queries of one head they need no copies of it.
        grouped = query.reshape(len(query), seen_keys.shape[1], -1, query.shape[-1])  # [decodes, kv_heads, groups, dim]
        return _attention(grouped, seen_keys, seen_values, group.mask, call).flatten(1, 2)

    def _gather(self, what: str, cache: Tensor, table: Tensor) -> Tensor:
        """Whole blocks side by side, [sequences, kv_heads, blocks * block_tokens, dim]. Good until the next call."""
        sequences, blocks = table.shape
        _, block_tokens, heads, dim = cache.shape
        taken = self._scratch.take(what, cache, (sequences * blocks, block_tokens, heads, dim))
        torch.index_select(cache, 0, table.flatten(), out=taken)
        return taken.view(sequences, blocks * block_tokens, heads, dim).transpose(1, 2)

    def _decode_groups(self, window: int | None) -> list[_DecodeGroup]:
        if window not in self._groups:
            views = [_seen_blocks(span, window, self._block_tokens) for span in self._decodes]
            by_size: dict[int, list[int]] = {}
            for row, seen in enumerate(views):
                by_size.setdefault(_size_class(len(seen) * self._block_tokens), []).append(row)
            self._groups[window] = [self._decode_view(rows, views, window) for rows in by_size.values()]
        return self._groups[window]

    def _decode_view(self, rows: list[int], views: Sequence[range], window: int | None) -> _DecodeGroup:
        tables = [torch.tensor([self._decodes[row].blocks[number] for number in views[row]]) for row in rows]
        table = nn.utils.rnn.pad_sequence(tables, batch_first=True)  # [decodes, most blocks]
        first = torch.tensor([views[row].start * self._block_tokens for row in rows])[:, None]  # [decodes, 1]
        end = torch.tensor([self._decodes[row].end for row in rows])[:, None]
        position = first + torch.arange(table.shape[1] * self._block_tokens)
        mask = position < end
        if window is not None:
            mask &= position >= end - window
        return _DecodeGroup(torch.tensor(rows).to(self._device), table.to(self._device), mask[:, None, None].to(self._device))

    def _prefill_views(self, window: int | None) -> list[tuple[Tensor, Tensor]]:
        """For each prefill chunk the blocks that its rows see, [1, blocks], and where each row may look."""
        if window not in self._chunks:
            self._chunks[window] = [self._prefill_view(span, window) for _, span in self._prefills]
        return self._chunks[window]

    def _prefill_view(self, span: Span, window: int | None) -> tuple[Tensor, Tensor]:
        seen = _seen_blocks(span, window, self._block_tokens)
        table = torch.tensor([[span.blocks[number] for number in seen]], device=self._device)
        positions = torch.arange(seen.start * self._block_tokens, seen.stop * self._block_tokens, device=self._device)
        return table, _causal_mask(span, positions, window)


def _size_class(tokens: int) -> int:
    """Contexts of one class are padded to the longest of them: at most to double, or up to a length where that costs less
    than attending to them apart.
    """
    return max(tokens - 1, _SHORT_CONTEXT_TOKENS - 1).bit_length()


def _seen_blocks(span: Span, window: int | None, block_tokens: int) -> range:
    """Which of the sequence's blocks the span's rows see, themselves included."""
    first = 0 if window is None else max(0, span.start + 1 - window)
    return range(first // block_tokens, -(-span.end // block_tokens))


def _seen(spans: Sequence[Span], block_tokens: int) -> Seen:
    pieces: list[tuple[int, int, int, int]] = []  # first row, length, end, and where the blocks begin
    singles: list[tuple[int, int, int, int]] = []
    blocks = array("q")
    row = 0
    for span in spans:
        start = len(blocks)
        blocks.extend(span.blocks[: -(-span.end // block_tokens)])
        if span.length == 1:
            singles.append((row, 1, span.end, start))
        else:
            for done in range(0, span.length, PIECE_ROWS):
                length = min(PIECE_ROWS, span.length - done)
                pieces.append((row + done, length, span.start + done + length, start))
        row += span.length
    rows, lengths, ends, starts = (torch.tensor(column) for column in zip(*pieces, *singles, strict=True))
    held = torch.frombuffer(blocks, dtype=torch.long)
    return Seen.of(len(pieces), rows, lengths, ends, starts, held, block_tokens)


def slots_of(span: Span, block_tokens: int) -> list[int]:
    """Where the keys and values of the span's own rows go, counted in tokens over all blocks."""
    return [span.blocks[at // block_tokens] * block_tokens + at % block_tokens for at in range(span.start, span.end)]


def _causal_mask(span: Span, positions: Tensor, window: int | None) -> Tensor:
    """True where a chunk's row may look, [length, positions]."""
    rows = torch.arange(span.start, span.end, device=positions.device)[:, None]
    mask = positions <= rows
    return mask if window is None else mask & (positions > rows - window)


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
