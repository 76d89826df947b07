"""Paged attention in Triton against plain attention over the same keys and values, in Triton's interpreter."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("triton", reason="the GPU's kernels need triton (pip install '.[gpu]')")

from service.engine.attention import AttentionCall
from service.engine.cuda.paged_attention import AttentionLayout, TritonCache
from service.engine.kv_cache import CacheRoom, LayerShape, Span

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    """A step: of each sequence the position of its first row and its number of rows."""

    places: list[tuple[int, int]]
    kv_heads: int
    group: int
    dim: int
    value_dim: int
    block_tokens: int
    window: int | None
    softcap: float | None
    dtype: torch.dtype = torch.float32
    parts: int = 16


def plain_attention(case: Case, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last rows of one sequence over all of it: [heads, rows, dim], [kv_heads, tokens, dim] to [rows, heads, dim]."""
    keys, values = (each.float().repeat_interleave(case.group, 0) for each in (keys, values))
    scores = query.float() @ keys.transpose(1, 2) * case.dim**-0.5
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    at = torch.arange(keys.shape[1], device=keys.device)
    rows = at[-query.shape[1] :, None]
    hidden = at > rows
    if case.window is not None:
        hidden |= at <= rows - case.window
    out: Tensor = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)
    return out


def run(case: Case, *, device: torch.device = CPU) -> tuple[list[Tensor], list[Tensor]]:
    """The kernels' answers and the plain ones, by sequence. Whatever no row may see is NaN in the cache."""
    generator = torch.Generator().manual_seed(0)

    def noise(heads: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(heads, tokens, dim, generator=generator).to(device, case.dtype)

    layer: nn.Module = nn.Identity()
    needed = [-(-(start + length) // case.block_tokens) for start, length in case.places]
    layers = {layer: LayerShape(case.kv_heads, case.dim, case.value_dim, case.window)}
    room = CacheRoom(layers, sum(needed) + 1, case.block_tokens, case.dtype, device)
    cache = TritonCache(room, parts=case.parts)
    tables = [each.tolist() for each in torch.split(torch.randperm(sum(needed), generator=generator), needed)]
    for tensor in cache._layers[layer]:
        tensor.fill_(torch.nan)
    queries, keys, values = [], [], []
    for (start, length), table in zip(case.places, tables, strict=True):
        queries.append(noise(case.kv_heads * case.group, length, case.dim))
        keys.append(noise(case.kv_heads, start + length, case.dim))
        values.append(noise(case.kv_heads, start + length, case.value_dim))
        for tensor, whole in zip(cache._layers[layer], (keys[-1], values[-1]), strict=True):
            first = 0 if case.window is None else max(0, start + 1 - case.window)
            for at in range(first, start):
                tensor[table[at // case.block_tokens], at % case.block_tokens] = whole[:, at]
    spans = [Span(start, length, table) for (start, length), table in zip(case.places, tables, strict=True)]
    rows = [slice(start, None) for start, _ in case.places]
    call = AttentionCall(
        torch.cat(queries, 1),
        torch.cat([each[:, own] for each, own in zip(keys, rows, strict=True)], 1),
        torch.cat([each[:, own] for each, own in zip(values, rows, strict=True)], 1),
        case.dim**-0.5,
        case.window,
        case.softcap,
    )
    got = torch.split(cache.plan(spans).attend(layer, call).float(), [length for _, length in case.places])
    return list(got), [plain_attention(case, *each) for each in zip(queries, keys, values, strict=True)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    place = st.tuples(st.integers(0, 200), st.just(1) | st.integers(1, 40))
    return Case(
        places=draw(st.lists(place, min_size=1, max_size=4)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 5)),
        dim=draw(st.sampled_from([8, 24])),
        value_dim=draw(st.sampled_from([8, 20])),
        block_tokens=draw(st.sampled_from([1, 4, 16, 24])),
        window=draw(st.none() | st.integers(1, 150)),
        softcap=draw(st.sampled_from([None, 5.0])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        parts=draw(st.sampled_from([2, 16])),
    )


@settings(max_examples=25)
@given(case=cases())
def test_rows_of_any_length_see_what_plain_attention_sees_and_no_other_block_is_read(case: Case) -> None:
    got, expected = run(case)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(torch.cat(got), torch.cat(expected), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 700])
def test_a_long_context_is_split_and_joined(window: int | None) -> None:
    case = Case([(1500, 1), (3, 1), (260, 1)], 1, 2, 8, 8, 16, window, None)
    got, expected = run(case)
    torch.testing.assert_close(torch.cat(got), torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_rows_of_padding_write_nothing_and_become_zeros() -> None:
    layer: nn.Module = nn.Identity()
    cache = TritonCache(CacheRoom({layer: LayerShape(2, 8, 8, None)}, 3, 4, torch.float32, CPU))
    layout = AttentionLayout.of([Span(5, 1, [2, 0])], 4).padded(3)
    call = AttentionCall(torch.randn(4, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8), 1.0, None, None)
    alone = AttentionCall(call.query[:, :1], call.key[:, :1], call.value[:, :1], 1.0, None, None)
    out = cache.over(layout.on(CPU)).attend(layer, call)
    assert torch.equal(out[1:], torch.zeros(2, 4, 8))
    keys, _ = cache._layers[layer]
    assert torch.equal(keys.flatten(0, 1).any(-1).any(-1).nonzero().flatten(), torch.tensor([1]))  # block 0, place 1
    assert torch.equal(cache.plan([Span(5, 1, [2, 0])]).attend(layer, alone)[0], out[0])
