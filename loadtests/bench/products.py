"""Ways to compute the adapters' product of a step, over every linear layer of the workload's blocks.

`stack`: the columns in use side by side and a mask, one product pair of torch's; `group`: rows in groups by adapter, padded
to the largest, one batched product pair; `gather`: each row's own columns copied out, one batched product pair; `kernel`: ours,
beyond the base's product that it follows, `base`. Stacking and grouping get their factors laid out for nothing.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loadtests import workload
from loadtests.bench.figures import Figures
from service.engine.native.kernels import BLOCK_ROWS, PANEL, LoraRows, Term, kernels, pack

_CASES: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "8 rows, 8 adapters of rank 2 to 16": ([1] * 8, workload.RANKS),
    "32 rows, 8 adapters of rank 2 to 16": ([4] * 8, workload.RANKS),
    "32 rows, 8 adapters of rank 2 to 16, one with 25 rows": ([25] + [1] * 7, workload.RANKS),
    "32 rows, 32 adapters of rank 16": ([1] * 32, [16] * 32),
    "32 rows, 32 adapters of rank 64": ([1] * 32, [64] * 32),
}
"""Rows of each adapter, and ranks."""
_LAYERS = 12
_SHAPES = [(768, 768), (768, 256), (768, 256), (768, 768), (768, 2048), (768, 2048), (2048, 768)]
"""(in, out) of a block's linear layers."""
_REPEATS = 7

Product = Callable[[Tensor], object]


def compare_products(figures: Figures) -> None:
    """Milliseconds of each way, and of the base's product."""
    for name, (counts, ranks) in _CASES.items():
        layers = [_ways(counts, ranks, *shape) for _ in range(_LAYERS) for shape in _SHAPES]
        inputs = [torch.randn(sum(counts), shape[0]) for _ in range(_LAYERS) for shape in _SHAPES]
        times: dict[str, list[float]] = {}
        for _ in range(_REPEATS):
            for way in layers[0]:
                started = time.perf_counter()
                for x, ways in zip(inputs, layers, strict=True):
                    ways[way](x)
                times.setdefault(way, []).append(time.perf_counter() - started)
        ms = {way: round(statistics.median(seconds) * 1e3, 2) for way, seconds in times.items()}
        if "kernel" in ms:
            ms["kernel"] = round(ms["kernel"] - ms["base"], 2)
        figures.show(products=name, milliseconds=ms)


def _ways(counts: Sequence[int], ranks: Sequence[int], in_features: int, out_features: int) -> dict[str, Product]:
    """Each way to compute one layer's product; rows of one adapter stand together."""
    columns, most, rows = sum(ranks), max(ranks), max(counts)
    a, b = torch.randn(columns, in_features), torch.randn(columns, out_features)
    starts = [sum(ranks[:number]) for number in range(len(ranks))]
    owners = torch.tensor([number for number, count in enumerate(counts) for _ in range(count)])
    column_owner = torch.tensor([number for number, rank in enumerate(ranks) for _ in range(rank)])
    mask = (owners[:, None] == column_owner).float()
    group_a, group_b = torch.zeros(len(ranks), in_features, most), torch.zeros(len(ranks), most, out_features)
    for number, (start, rank) in enumerate(zip(starts, ranks, strict=True)):
        group_a[number, :, :rank], group_b[number, :rank] = a[start : start + rank].T, b[start : start + rank]
    places = torch.tensor([number * rows + row for number, count in enumerate(counts) for row in range(count)])
    across = a.T.contiguous()

    def stack(x: Tensor) -> Tensor:
        return ((x @ across) * mask) @ b

    def group(x: Tensor) -> Tensor:
        padded = x.new_zeros(len(ranks) * rows, in_features).index_copy_(0, places, x).view(len(ranks), rows, in_features)
        return torch.bmm(torch.bmm(padded, group_a), group_b).view(-1, out_features)[places]

    def gather(x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x[:, None], group_a[owners]), group_b[owners])[:, 0]

    weight, native = torch.randn(out_features, in_features), kernels()
    ways: dict[str, Product] = {"stack": stack, "group": group, "gather": gather}
    ways["torch's base"] = lambda x: torch.nn.functional.linear(x, weight)
    if native is None:
        return ways
    panels = [part.view(len(part), -1, PANEL).transpose(0, 1).reshape(-1) for part in torch.split(b, list(ranks))]
    packed = pack(weight)
    base, mixed = native.products([Term(packed)]), native.products([Term(packed, None, a, torch.cat(panels))])
    laid_out = _laid_out(counts, ranks, starts)
    return ways | {"base": base, "kernel": lambda x: mixed(x, laid_out)}


def _laid_out(counts: Sequence[int], ranks: Sequence[int], starts: Sequence[int]) -> LoraRows:
    first_rows = [sum(counts[:number]) for number in range(len(counts))]
    blocks = [
        (number, list(range(first, min(first + BLOCK_ROWS, first_rows[number] + count))))
        for number, count in enumerate(counts)
        for first in range(first_rows[number], first_rows[number] + count, BLOCK_ROWS)
    ]
    owners = [number for number, _ in blocks]
    return LoraRows(
        counts=torch.tensor([len(rows) for _, rows in blocks]),
        starts=torch.tensor([starts[number] for number in owners]),
        widths=torch.tensor([ranks[number] for number in owners]),
        ranks=torch.tensor([ranks[number] for number in owners]),
        rows=torch.tensor([rows + rows[:1] * (BLOCK_ROWS - len(rows)) for _, rows in blocks]),
        row_ranks=torch.tensor([[ranks[number]] * BLOCK_ROWS for number in owners]),
        scales=torch.ones(len(blocks), BLOCK_ROWS),
    )
