"""The keys and values of all running sequences on a GPU, and a step's attention over them."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from service.engine.attention import AttentionCall
from service.engine.cuda.attention_kernels import PREFILL_ROWS, TILE_INTS, attend, write_cache
from service.engine.cuda.device_ints import ints, to_device
from service.engine.kv_cache import CacheRoom, Span, slots_of

MOST_PARTS = 16
"""Programs that share the keys of a decode row, at most."""


@dataclass(frozen=True)
class AttentionTiles:
    """Where a step's rows stand, on the device; all int32.

    Attributes:
        slots: [rows], where each row's key and value go, -1 for a row without.
        decodes, prefills: [tiles, TILE_INTS], see `attention_kernels`.
        blocks: the block tables of all sequences, one after the other.
    """

    slots: Tensor
    decodes: Tensor
    prefills: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class AttentionLayout:
    """`AttentionTiles` in the making: the same numbers, flat."""

    slots: "array[int]" = field(default_factory=ints)
    decodes: "array[int]" = field(default_factory=ints)
    prefills: "array[int]" = field(default_factory=ints)
    blocks: "array[int]" = field(default_factory=ints)

    @classmethod
    def of(cls, spans: Sequence[Span], block_tokens: int) -> "AttentionLayout":
        """Of one step's rows, packed in the order of `spans`."""
        layout = cls()
        row = 0
        for span in spans:
            table = len(layout.blocks)
            layout.blocks.extend(span.blocks[: -(-span.end // block_tokens)])
            layout.slots.extend(slots_of(span, block_tokens))
            if span.length == 1:
                layout.decodes.extend((row, 1, span.start, table))
            else:
                for first in range(0, span.length, PREFILL_ROWS):
                    rows = min(PREFILL_ROWS, span.length - first)
                    layout.prefills.extend((row + first, rows, span.start + first, table))
            row += span.length
        return layout

    def padded(self, rows: int) -> "AttentionLayout":
        """Decode rows alone, with further rows that write nothing and see nothing."""
        held = len(self.slots)
        slots = self.slots + ints([-1] * (rows - held))
        tiles = self.decodes + ints([number for row in range(held, rows) for number in (row, 1, -1, 0)])
        return AttentionLayout(slots, tiles, self.prefills, self.blocks)

    def on(self, device: torch.device) -> AttentionTiles:
        """On the device."""
        slots, decodes, prefills, blocks = to_device([self.slots, self.decodes, self.prefills, self.blocks], device)
        return AttentionTiles(slots, decodes.view(-1, TILE_INTS), prefills.view(-1, TILE_INTS), blocks)


class TritonCache:
    """Paged keys and values, as `KVCache` has them, read and written by kernels."""

    def __init__(self, room: CacheRoom, *, parts: int = MOST_PARTS) -> None:
        """`parts`: programs that share the keys of a decode row, at most."""
        self.block_tokens = room.block_tokens
        self.device = room.device
        self._parts = parts
        self._layers = room.tensors()

    def plan(self, spans: Sequence[Span]) -> "TritonAttention":
        """Lay out one step's rows, packed in the order of `spans`."""
        return self.over(AttentionLayout.of(spans, self.block_tokens).on(self.device))

    def over(self, tiles: AttentionTiles) -> "TritonAttention":
        """The attention of rows that stand on the device."""
        return TritonAttention(self._layers, tiles, self._parts)


class TritonAttention:
    """One step's attention: every row sees its own sequence up to itself, or its window of it."""

    def __init__(self, layers: Mapping[nn.Module, tuple[Tensor, Tensor]], tiles: AttentionTiles, parts: int) -> None:
        self._layers = layers
        self._tiles = tiles
        self._parts = parts

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """Output of one layer, [rows, heads, value_dim]."""
        keys, values = self._layers[module]  # [blocks, block_tokens, kv_heads, dim]
        query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (call.query, call.key, call.value))
        write_cache(key, value, self._tiles.slots, keys, values)
        heads, rows, _ = query.shape
        out = query.new_empty(rows, heads, value.shape[-1])
        for tiles, tile_rows, parts in (
            (self._tiles.decodes, 1, self._parts),
            (self._tiles.prefills, PREFILL_ROWS, 1),
        ):
            if len(tiles):
                attend(
                    *(query, keys, values, out, tiles, self._tiles.blocks),
                    tile_rows=tile_rows,
                    parts=parts,
                    window=call.window,
                    scale=call.scale,
                    softcap=call.softcap,
                )
        return out
