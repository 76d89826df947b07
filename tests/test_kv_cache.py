"""Paged attention against plain attention over the same keys and values."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from service.engine.attention import AttentionCall
from service.engine.kv_cache import CacheRoom, KVCache, LayerShape, NativeAttention, Span
from service.engine.native.kernels import kernels
from tests.native_widths import WIDTHS, kernels_of

HEADS, KV_HEADS, DIM = 4, 2, 8


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, *, window: int | None, softcap: float | None) -> Tensor:
    """The last rows of one sequence over all of it: [heads, rows, dim], [kv_heads, tokens, dim] to [rows, heads, dim]."""
    keys, values = (each.repeat_interleave(len(query) // len(each), 0) for each in (keys, values))
    scores = query @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    tokens = keys.shape[1]
    at = torch.arange(tokens)
    rows = at[-query.shape[1] :, None]
    hidden = at > rows
    if window is not None:
        hidden |= at <= rows - window
    out: Tensor = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)
    return out


def packed(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=1)


@pytest.mark.parametrize("window", [None, 1, 8, 100, 300])
@pytest.mark.parametrize("softcap", [None, 5.0])
# Position of the first row and number of rows: decode rows far apart in length beside chunks at a start, inside and a long one.
@pytest.mark.parametrize(
    "places", [[(900, 1), (3, 1), (20, 1), (257, 1), (511, 1), (899, 1)], [(0, 7), (600, 1), (330, 40), (5, 1)]]
)
@pytest.mark.parametrize("kernels_width", [*WIDTHS, None])
def test_rows_of_any_length_see_what_plain_attention_sees(
    window: int | None, softcap: float | None, places: list[tuple[int, int]], kernels_width: str | None
) -> None:
    if kernels_width and kernels() is None:
        pytest.skip("there is no C compiler")
    torch.manual_seed(0)
    layer = nn.Identity()
    block_tokens = 16
    shape = LayerShape(KV_HEADS, DIM, DIM, window)
    needed = [-(-(start + length) // block_tokens) for start, length in places]
    room = CacheRoom({layer: shape}, sum(needed), block_tokens, torch.float32, torch.device("cpu"))
    cache = KVCache(room, kernels_of(kernels_width) if kernels_width else None)
    shuffled = torch.split(torch.randperm(sum(needed)), needed)  # nobody's blocks are in order
    keys = [torch.randn(KV_HEADS, start + length, DIM) for start, length in places]
    values = [torch.randn(KV_HEADS, start + length, DIM) for start, length in places]
    queries = [torch.randn(HEADS, length, DIM) for _, length in places]

    def attend(spans: list[Span], query: list[Tensor], key: list[Tensor], value: list[Tensor]) -> Tensor:
        call = AttentionCall(packed(query), packed(key), packed(value), DIM**-0.5, window, softcap)
        return cache.plan(spans).attend(layer, call)

    for blocks, key, value, (start, _) in zip(shuffled, keys, values, places, strict=True):
        if start:  # what was computed in earlier steps
            before = Span(0, start, blocks.tolist())
            attend([before], [torch.randn(HEADS, start, DIM)], [key[:, :start]], [value[:, :start]])
    spans = [Span(start, length, blocks.tolist()) for (start, length), blocks in zip(places, shuffled, strict=True)]
    new_keys = [key[:, start:] for key, (start, _) in zip(keys, places, strict=True)]
    new_values = [value[:, start:] for value, (start, _) in zip(values, places, strict=True)]
    got = attend(spans, queries, new_keys, new_values)
    expected = [
        plain_attention(query, key, value, window=window, softcap=softcap)
        for query, key, value in zip(queries, keys, values, strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(expected))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.skipif(kernels() is None, reason="there is no C compiler")
def test_a_prompt_row_has_the_same_bits_in_chunks_of_any_size(width: str, window: int | None) -> None:
    torch.manual_seed(0)
    layer, tokens = nn.Identity(), 400
    room = CacheRoom({layer: LayerShape(KV_HEADS, DIM, DIM, window)}, 25, 16, torch.float32, torch.device("cpu"))
    query, key, value = torch.randn(HEADS, tokens, DIM), torch.randn(KV_HEADS, tokens, DIM), torch.randn(KV_HEADS, tokens, DIM)
    blocks = torch.randperm(25).tolist()

    def attend_in(lengths: Sequence[int]) -> Tensor:
        cache = KVCache(room, kernels_of(width))
        outs, start = [], 0
        for length in lengths:
            rows = slice(start, start + length)
            call = AttentionCall(query[:, rows], key[:, rows], value[:, rows], DIM**-0.5, window, None)
            outs.append(cache.plan([Span(start, length, blocks)]).attend(layer, call))
            start += length
        return torch.cat(outs)

    assert torch.equal(attend_in([tokens]), attend_in([7, 2, 164, 133, 94]))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.skipif(kernels() is None, reason="there is no C compiler")
def test_a_long_row_has_the_same_bits_alone_and_beside_others_by_any_number_of_threads(width: str, window: int | None) -> None:
    """Its positions are taken in parts, by heads or by all threads; 32 of these are a span, and 256 a part."""
    torch.manual_seed(0)
    heads, kv_heads, dim, block_tokens = 12, 4, 64, 16
    ends = [1500, 1, 31, 33, 256, 257, 300, 801, 1500, 513]
    needed = [-(-end // block_tokens) for end in ends]
    layer = nn.Identity()
    room = CacheRoom(
        {layer: LayerShape(kv_heads, dim, dim, window)}, sum(needed), block_tokens, torch.float32, torch.device("cpu")
    )
    cache = KVCache(room, kernels_of(width))
    tables = torch.split(torch.randperm(sum(needed)), needed)
    query, key, value = (
        [torch.randn(count, length, dim) for length in lengths]
        for count, lengths in ((heads, [1] * len(ends)), (kv_heads, ends), (kv_heads, ends))
    )

    def attend(rows: Sequence[int]) -> Tensor:
        spans = [Span(ends[row] - 1, 1, tables[row].tolist()) for row in rows]
        last_keys, last_values = ([each[row][:, -1:] for row in rows] for each in (key, value))
        call = AttentionCall(packed([query[row] for row in rows]), packed(last_keys), packed(last_values), 0.125, window, None)
        return cache.plan(spans).attend(layer, call)

    for row, end in enumerate(ends):
        before = AttentionCall(torch.zeros(heads, end, dim), key[row], value[row], 0.125, window, None)
        cache.plan([Span(0, end, tables[row].tolist())]).attend(layer, before)
    together = attend(range(len(ends)))
    expected = [plain_attention(*each, window=window, softcap=None) for each in zip(query, key, value, strict=True)]
    torch.testing.assert_close(together, torch.cat(expected))
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(torch.cat([attend([row]) for row in range(len(ends))]), together)
            assert torch.equal(attend([0, 5]), together[[0, 5]])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(kernels() is None, reason="there is no C compiler")
def test_a_long_context_costs_those_beside_it_no_room_in_the_layout_of_a_step() -> None:
    layer = nn.Identity()
    room = CacheRoom({layer: LayerShape(KV_HEADS, DIM, DIM, None)}, 1, 16, torch.float32, torch.device("cpu"))
    spans = [Span(10_000, 1, range(626)), *(Span(20, 1, range(2)) for _ in range(31)), Span(0, 100, range(7))]
    planned = KVCache(room, kernels()).plan(spans)
    assert isinstance(planned, NativeAttention)
    *_, blocks = planned.seen.held
    assert len(blocks) == 626 + 31 * 2 + 7
