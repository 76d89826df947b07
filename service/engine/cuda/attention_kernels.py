"""Attention over paged keys and values on a GPU: decode rows and prefill chunks by one kernel, reading only the blocks in use.

Queries stand in tiles: consecutive rows of one sequence with the query heads that share a key/value head, so that a key is
read once for all of them. A tile walks over the keys that its rows can see, from the window's begin to its last row, a tile of
keys at a time, with a running maximum and sum (Milakov and Gimelshein, 2018; FlashAttention). Of a decode row, which has a
tile to itself, the keys are split over programs (Flash-Decoding), as many as its own context is worth, and `_combine` joins
their parts: bounded by the bandwidth for a row's own keys and values, whatever the contexts of the others. How keys are split
depends on the row's own position alone, so its numbers do not depend on its neighbours.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor, float32

from service.engine.cuda.products import add_product

PREFILL_ROWS = 16
"""Most rows of a tile of a prefill chunk."""
TILE_INTS = 4
"""Numbers that describe a tile: first row, rows, position of the first row, where its sequence's blocks begin."""
_LEAST_QUERIES = 16  # that tensor cores multiply
_FEW_QUERIES = 32
_MOST_QUERIES = 128
_LEAST_KEY_TILES = 4
"""Of a part of a decode row's keys: shorter parts would take longer to join than to compute."""


def write_cache(key: Tensor, value: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Put keys and values into slots of a layer's cache.

    Args:
        key, value: [kv_heads, rows, dim], dense in their last dimension.
        slots: [rows], int32, counted in tokens over all blocks; a row with -1 is left out.
        keys, values: [blocks, block_tokens, kv_heads, dim], contiguous.
    """
    heads, rows, dim = key.shape
    _write[(rows, 2)](
        *(key, value, slots, keys, values, key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
        HEADS=heads,
        KEY_DIM=dim,
        VALUE_DIM=value.shape[2],
        KEY_SIZE=triton.next_power_of_2(heads * dim),
        VALUE_SIZE=triton.next_power_of_2(heads * value.shape[2]),
    )


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    tiles: Tensor,
    blocks: Tensor,
    *,
    tile_rows: int,
    parts: int,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> None:
    """Attention of the rows in `tiles`, written to the same rows of `out`.

    Args:
        query: [heads, all rows, dim], dense in its last dimension.
        keys, values: a layer's cache [blocks, block_tokens, kv_heads, dim], contiguous.
        out: [all rows, heads, value_dim], contiguous.
        tiles: [tiles, TILE_INTS], int32. A tile at position -1 sees nothing, and its row becomes zeros.
        blocks: int32, the block tables of all sequences one after the other.
        tile_rows: most rows of a tile. 1, if the keys are to be split.
        parts: most programs that share a row's keys.
    """
    heads, _, dim = query.shape
    _, block_tokens, kv_heads, value_dim = values.shape
    sizes = tile_sizes(tile_rows, heads // kv_heads, dim, value_dim, keys.itemsize)
    seen = {"WINDOW": window or 0, "TILE_KEYS": sizes["TILE_KEYS"], "PARTS": parts, "LEAST_TILES": _LEAST_KEY_TILES}
    rows = len(tiles) if parts > 1 else 0
    sums = query.new_empty(parts, rows, heads, value_dim, dtype=float32)
    weights = query.new_empty(parts, rows, heads, 2, dtype=float32)  # maximum and sum
    _attend[(len(tiles), heads // sizes["GROUP"], parts)](
        *(query, keys, values, tiles, blocks, out, sums, weights, scale, softcap or 0.0, rows),
        *(query.stride(0), query.stride(1)),
        **{**seen, **sizes},
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_TOKENS=block_tokens,
        HAS_SOFTCAP=softcap is not None,
        num_warps=warps_for(sizes["QUERIES"]),
    )
    if parts > 1:
        _combine[(len(tiles), heads)](
            *(tiles, out, sums, weights, heads, rows), **seen, VALUE_DIM=value_dim, PAD_VALUE=sizes["PAD_VALUE"]
        )


@functools.cache
def tile_sizes(rows: int, group: int, dim: int, value_dim: int, itemsize: int) -> dict[str, int]:
    """Sizes of `_attend`'s tiles for rows of so many query heads to a key/value head, and heads of these dimensions.

    GROUP is the part of those heads that share a tile. QUERIES, TILE_KEYS and what dimensions are padded to are powers of two.
    They are as large as registers allow: `python -m tests.compile_cuda_kernels` tells what is spilled.
    """
    shared = max(size for size in range(1, group + 1) if group % size == 0 and (rows * size <= _MOST_QUERIES or size == 1))
    queries = max(_LEAST_QUERIES, triton.next_power_of_2(rows * shared))
    return {
        "GROUP": shared,
        "QUERIES": queries,
        "TILE_KEYS": (128 if queries <= _FEW_QUERIES else 64) // itemsize,
        "PAD_DIM": max(16, triton.next_power_of_2(dim)),
        "PAD_VALUE": max(16, triton.next_power_of_2(value_dim)),
    }


def warps_for(queries: int) -> int:
    """Groups of 32 threads that share a tile of `_attend`."""
    return 4 if queries == _LEAST_QUERIES else 8


@triton.jit
def _write(
    key,
    value,
    slots,
    keys,
    values,
    key_head_stride,
    key_row_stride,
    value_head_stride,
    value_row_stride,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        if tl.program_id(1) == 0:
            at = tl.arange(0, KEY_SIZE)
            is_there = at < HEADS * KEY_DIM
            of_row = key + row * key_row_stride + at // KEY_DIM * key_head_stride + at % KEY_DIM
            tl.store(keys + slot * (HEADS * KEY_DIM) + at, tl.load(of_row, mask=is_there), mask=is_there)
        else:
            at = tl.arange(0, VALUE_SIZE)
            is_there = at < HEADS * VALUE_DIM
            of_row = value + row * value_row_stride + at // VALUE_DIM * value_head_stride + at % VALUE_DIM
            tl.store(values + slot * (HEADS * VALUE_DIM) + at, tl.load(of_row, mask=is_there), mask=is_there)


@triton.jit
def _seen(position, rows, WINDOW: tl.constexpr, TILE_KEYS: tl.constexpr):
    """Of a tile of queries: the first key that its first row sees, and the tiles of keys up to its last row."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position + 1 - WINDOW, 0)
    first_tile = first // TILE_KEYS
    return first, first_tile, tl.cdiv(position + rows, TILE_KEYS) - first_tile


@triton.jit
def _attend(
    query,  # [heads, all rows, dim]
    keys,  # [slots, kv_heads, dim]
    values,  # [slots, kv_heads, value_dim]
    tiles,  # [tiles, 4]
    blocks,
    out,  # [all rows, heads, value_dim]
    sums,  # [parts, tiles, heads, value_dim]
    weights,  # [parts, tiles, heads, 2]
    scale,
    softcap,
    n_tiles,
    query_head_stride,
    query_row_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PAD_DIM: tl.constexpr,
    PAD_VALUE: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(2)
    first_head = tl.program_id(1) * GROUP
    kv_head = first_head // (HEADS // KV_HEADS)
    first_row = tl.load(tiles + tile * 4)
    rows = tl.load(tiles + tile * 4 + 1)
    first_position = tl.load(tiles + tile * 4 + 2)
    table = tl.load(tiles + tile * 4 + 3)
    first_key, first_tile, key_tiles = _seen(first_position, rows, WINDOW, TILE_KEYS)
    per_part = tl.maximum(tl.cdiv(key_tiles, PARTS), LEAST_TILES) if PARTS > 1 else key_tiles
    if part == 0 or part * per_part < key_tiles:
        at = tl.arange(0, QUERIES)
        row = at // GROUP
        head = first_head + at % GROUP
        is_query = row < rows
        position = first_position + row
        dims = tl.arange(0, PAD_DIM)
        value_dims = tl.arange(0, PAD_VALUE)
        query_at = query + head[:, None] * query_head_stride + (first_row + row)[:, None] * query_row_stride + dims[None, :]
        q = tl.load(query_at, mask=is_query[:, None] & (dims < DIM)[None, :], other=0.0)
        highest = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        weighted = tl.zeros((QUERIES, PAD_VALUE), tl.float32)
        for number in range(part * per_part, tl.minimum((part + 1) * per_part, key_tiles)):
            key_position = (first_tile + number) * TILE_KEYS + tl.arange(0, TILE_KEYS)
            is_key = (key_position >= first_key) & (key_position < first_position + rows)
            block = tl.load(blocks + table + key_position // BLOCK_TOKENS, mask=is_key, other=0).to(tl.int64)
            slot = (block * BLOCK_TOKENS + key_position % BLOCK_TOKENS) * KV_HEADS + kv_head
            k = tl.load(keys + slot[None, :] * DIM + dims[:, None], mask=is_key[None, :] & (dims < DIM)[:, None], other=0.0)
            scores = add_product(q, k, tl.zeros((QUERIES, TILE_KEYS), tl.float32)) * scale
            if HAS_SOFTCAP:
                scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # softcap * tanh(scores / softcap)
            sees = is_key[None, :] & (key_position[None, :] <= position[:, None])
            if WINDOW > 0:
                sees = sees & (key_position[None, :] > position[:, None] - WINDOW)
            scores = tl.where(sees, scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # a row may see none of these keys
            probable = tl.exp(scores - base[:, None])
            kept = tl.exp(highest - base)
            v_at = values + slot[:, None] * VALUE_DIM + value_dims[None, :]
            v = tl.load(v_at, mask=is_key[:, None] & (value_dims < VALUE_DIM)[None, :], other=0.0)
            weighted = add_product(probable.to(v.dtype), v, weighted * kept[:, None])
            total = total * kept + tl.sum(probable, 1)
            highest = new_highest
        is_value = is_query[:, None] & (value_dims < VALUE_DIM)[None, :]
        if PARTS > 1:
            row_head = (part * n_tiles + tile) * HEADS + head
            tl.store(sums + row_head[:, None] * VALUE_DIM + value_dims[None, :], weighted, mask=is_value)
            tl.store(weights + row_head * 2, highest, mask=is_query)
            tl.store(weights + row_head * 2 + 1, total, mask=is_query)
        else:
            answer = weighted / tl.where(total == 0.0, 1.0, total)[:, None]
            out_at = out + ((first_row + row) * HEADS + head)[:, None] * VALUE_DIM + value_dims[None, :]
            tl.store(out_at, answer.to(out.dtype.element_ty), mask=is_value)


@triton.jit
def _combine(
    tiles,  # [tiles, 4], each of one row
    out,  # [all rows, heads, value_dim]
    sums,  # [parts, tiles, heads, value_dim]
    weights,  # [parts, tiles, heads, 2]
    heads,
    n_tiles,
    VALUE_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    PAD_VALUE: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(tiles + tile * 4)
    _, _, key_tiles = _seen(tl.load(tiles + tile * 4 + 2), 1, WINDOW, TILE_KEYS)
    per_part = tl.maximum(tl.cdiv(key_tiles, PARTS), LEAST_TILES)
    value_dims = tl.arange(0, PAD_VALUE)
    is_value = value_dims < VALUE_DIM
    highest = float("-inf")
    total = 0.0
    weighted = tl.zeros((PAD_VALUE,), tl.float32)
    for part in range(0, tl.cdiv(key_tiles, per_part)):
        row_head = (part * n_tiles + tile) * heads + head
        own_highest = tl.load(weights + row_head * 2)
        new_highest = tl.maximum(highest, own_highest)
        kept, gained = tl.exp(highest - new_highest), tl.exp(own_highest - new_highest)
        own = tl.load(sums + row_head * VALUE_DIM + value_dims, mask=is_value, other=0.0)
        weighted = weighted * kept + own * gained
        total = total * kept + tl.load(weights + row_head * 2 + 1) * gained
        highest = new_highest
    answer = weighted / tl.where(total == 0.0, 1.0, total)
    tl.store(out + (row * heads + head) * VALUE_DIM + value_dims, answer.to(out.dtype.element_ty), mask=is_value)
