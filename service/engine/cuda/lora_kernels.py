"""The adapters' product on a GPU: `out[row] += scale * (x[row] A^T) B` with each row's own adapter and rank.

Rows stand in tiles of up to TILE_ROWS that share an adapter, and a launch takes all tiles, whatever their ranks:

    shrink   low[part, row, j] = sum over one part of the features of x[row, k] a[start + j, k]
    expand   out[row, n] += scale[row] * sum over j < rank[row] of (sum over parts of low[part, row, j]) b[start + j, n]

A tile reads the first `rank` of its adapter's columns in the bank, and no others: what bounds the pair at few rows is the
bandwidth for rank * (in + out) numbers an adapter, at many rows the product of x. Sums are in float32. Features are summed in
parts, so that a few rows occupy the whole device, and parts are added in order and not by atomics: a row's numbers depend
on nothing but itself. Nothing about a launch depends on the adapters or ranks of the step, so a CUDA graph can hold it.

The layout is that of SGMV (Chen et al., Punica, 2023) with a rank for each row.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from service.engine.cuda.products import add_product

TILE_ROWS = 16
"""Rows of a tile: the least that tensor cores multiply."""
TILE_INTS = 2 + TILE_ROWS
"""Numbers that describe a tile: first column, rank, rows."""
_TILE_RANK = 16
_TILE_FEATURES = 64
_PART_FEATURES = 1024
_TILE_OUT = 128


@dataclass(frozen=True)
class LoraTiles:
    """The rows of a step that have adapters.

    Attributes:
        tiles: [tiles, TILE_INTS], int32: the adapter's first column in the bank, the highest rank of the rows, the rows and -1
            in the places left over. A tile of rank 0 has no rows.
        ranks, scales: [rows], int32 and float32, each row's own.
        width: no rank is higher.
    """

    tiles: Tensor
    ranks: Tensor
    scales: Tensor
    width: int


def add_lora(x: Tensor, out: Tensor, a: Tensor, b: Tensor, rows: LoraTiles) -> None:
    """Add each row's own update to `out`, in place.

    Args:
        x: [rows, in], dense in its last dimension.
        out: [rows, out], the same.
        a, b: the bank's columns, [columns, in] and [columns, out], contiguous.
    """
    tiles, in_features, out_features = len(rows.tiles), x.shape[1], out.shape[1]
    parts = triton.cdiv(in_features, _PART_FEATURES)
    low = x.new_empty(parts, len(x), rows.width, dtype=rows.scales.dtype)
    _shrink[(tiles, parts)](
        *(x, a, rows.tiles, low, in_features, x.stride(0), low.stride(0), rows.width),
        PART_FEATURES=_PART_FEATURES,
        TILE_ROWS=TILE_ROWS,
        TILE_RANK=_TILE_RANK,
        TILE_FEATURES=_TILE_FEATURES,
    )
    _expand[(tiles, triton.cdiv(out_features, _TILE_OUT))](
        *(low, b, rows.tiles, rows.ranks, rows.scales, out, out_features, out.stride(0), low.stride(0), rows.width),
        PARTS=parts,
        TILE_ROWS=TILE_ROWS,
        TILE_RANK=_TILE_RANK,
        TILE_OUT=_TILE_OUT,
    )


@triton.jit
def _shrink(
    x,  # [rows, in]
    a,  # [columns, in]
    tiles,  # [tiles, 2 + TILE_ROWS]
    low,  # [parts, rows, width]
    in_features,
    x_stride,
    part_stride,
    width,
    PART_FEATURES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_RANK: tl.constexpr,
    TILE_FEATURES: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * (2 + TILE_ROWS)
    part = tl.program_id(1)
    start = tl.load(tile).to(tl.int64)
    rank = tl.load(tile + 1)
    rows = tl.load(tile + 2 + tl.arange(0, TILE_ROWS))
    is_row = rows >= 0
    end = tl.minimum((part + 1) * PART_FEATURES, in_features)
    for first in range(0, rank, TILE_RANK):
        columns = first + tl.arange(0, TILE_RANK)
        is_column = columns < rank
        total = tl.zeros((TILE_ROWS, TILE_RANK), tl.float32)
        for begin in range(part * PART_FEATURES, end, TILE_FEATURES):
            features = begin + tl.arange(0, TILE_FEATURES)
            is_feature = features < end
            x_at = x + rows[:, None] * x_stride + features[None, :]
            x_tile = tl.load(x_at, mask=is_row[:, None] & is_feature[None, :], other=0.0)
            a_at = a + (start + columns)[None, :] * in_features + features[:, None]
            a_tile = tl.load(a_at, mask=is_column[None, :] & is_feature[:, None], other=0.0)
            total = add_product(x_tile, a_tile, total)
        low_at = low + part * part_stride + rows[:, None] * width + columns[None, :]
        tl.store(low_at, total, mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _expand(
    low,  # [parts, rows, width]
    b,  # [columns, out]
    tiles,  # [tiles, 2 + TILE_ROWS]
    ranks,  # [rows]
    scales,  # [rows]
    out,  # [rows, out]
    out_features,
    out_stride,
    part_stride,
    width,
    PARTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_RANK: tl.constexpr,
    TILE_OUT: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * (2 + TILE_ROWS)
    rank = tl.load(tile + 1)
    if rank > 0:
        start = tl.load(tile).to(tl.int64)
        rows = tl.load(tile + 2 + tl.arange(0, TILE_ROWS))
        is_row = rows >= 0
        outputs = tl.program_id(1) * TILE_OUT + tl.arange(0, TILE_OUT)
        is_output = outputs < out_features
        own_rank = tl.load(ranks + rows, mask=is_row, other=0)
        scale = tl.load(scales + rows, mask=is_row, other=0.0)
        total = tl.zeros((TILE_ROWS, TILE_OUT), tl.float32)
        for first in range(0, rank, TILE_RANK):
            columns = first + tl.arange(0, TILE_RANK)
            low_at = low + rows[:, None] * width + columns[None, :]
            is_used = columns[None, :] < own_rank[:, None]
            own = tl.zeros((TILE_ROWS, TILE_RANK), tl.float32)
            for part in range(PARTS):
                own += tl.load(low_at + part * part_stride, mask=is_used, other=0.0)
            b_at = b + (start + columns)[:, None] * out_features + outputs[None, :]
            b_tile = tl.load(b_at, mask=(columns < rank)[:, None] & is_output[None, :], other=0.0)
            total = add_product(own.to(b_tile.dtype), b_tile, total)
        out_at = out + rows[:, None] * out_stride + outputs[None, :]
        is_there = is_row[:, None] & is_output[None, :]
        base = tl.load(out_at, mask=is_there, other=0.0).to(tl.float32)
        tl.store(out_at, (base + scale[:, None] * total).to(out.dtype.element_ty), mask=is_there)
