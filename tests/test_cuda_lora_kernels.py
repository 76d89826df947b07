"""The adapters' product in Triton against torch's own, in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the GPU's kernels need triton (pip install '.[gpu]')")

from service.core import AdapterChoice
from service.engine.cuda.lora_kernels import add_lora
from service.engine.cuda.lora_product import lay_out

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def noise(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def one_by_one(
    x: torch.Tensor,
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    owners: list[AdapterChoice | None],
    starts: dict[str, int],
) -> torch.Tensor:
    """What each row should become, in float32."""
    expected = out.float().clone()
    for row, owner in enumerate(owners):
        if owner is not None:
            own = slice(starts[owner.version], starts[owner.version] + owner.rank)
            expected[row] += owner.scale * (x[row].float() @ a[own].float().T) @ b[own].float()
    return expected


Rows = tuple[list[AdapterChoice | None], dict[str, int], int]
"""Each row's adapter and rank; where each adapter begins in the bank; the bank's columns."""


def some_rows() -> Rows:
    """More rows of one adapter than a tile holds, at all of its ranks, one row of another, and rows without."""
    owners: list[AdapterChoice | None] = [AdapterChoice("many", 1 + row % 40, 0.5) for row in range(45)]
    return [*owners, None, AdapterChoice("one", 3, 2.0), None], {"one": 0, "many": 5}, 50


@st.composite
def rows_of_adapters(draw: st.DrawFn) -> Rows:
    """Rows with adapters of any rank, several ranks of one adapter, and rows without."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    starts, end = {}, 0
    for number, size in enumerate(sizes):
        starts[f"v{number}"] = end
        end += size + draw(st.integers(0, 3))
    numbers = st.integers(0, len(sizes) - 1)
    choice = numbers.flatmap(
        lambda n: st.builds(AdapterChoice, st.just(f"v{n}"), st.integers(1, sizes[n]), st.sampled_from([0.25, 1.0, 3.0]))
    )
    return draw(st.lists(st.none() | choice, min_size=1, max_size=40)), starts, end


def sums_of(
    owners: list[AdapterChoice | None],
    starts: dict[str, int],
    columns: int,
    *,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    spare_tiles: int = 0,
    device: torch.device = CPU,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels make of rows of noise, and what they should, in float32. Columns that no row uses are NaN."""
    x = noise(len(owners), in_features, seed=0, dtype=dtype)
    a = noise(columns, in_features, seed=1, dtype=dtype) / in_features**0.5
    b = noise(columns, out_features, seed=2, dtype=dtype) / columns**0.5
    out = noise(len(owners), out_features, seed=3, dtype=dtype)
    expected = one_by_one(x, out, a, b, owners, starts)
    used = torch.zeros(columns, dtype=torch.bool)
    for owner in owners:
        if owner is not None:
            used[starts[owner.version] : starts[owner.version] + owner.rank] = True
    a[~used] = torch.nan
    b[~used] = torch.nan
    layout = lay_out(owners, starts)
    tiles = layout.padded(len(owners), len(layout.tiles) + spare_tiles).on(device)
    x, out, a, b = (each.to(device) for each in (x, out, a, b))
    add_lora(x, out, a, b, tiles)
    return out.float().cpu(), expected


@settings(max_examples=25)
@given(
    rows=rows_of_adapters(),
    in_features=st.sampled_from([1, 31, 64, 200]),
    out_features=st.sampled_from([1, 16, 130]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spare_tiles=st.integers(0, 2),
)
def test_each_row_gets_its_own_adapter_rank_and_scale(
    rows: Rows, in_features: int, out_features: int, dtype: torch.dtype, spare_tiles: int
) -> None:
    got, expected = sums_of(*rows, in_features=in_features, out_features=out_features, dtype=dtype, spare_tiles=spare_tiles)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_long_inputs_are_summed_in_parts() -> None:
    got, expected = sums_of(*some_rows(), in_features=2500, out_features=8, dtype=torch.float32)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_rows_numbers_do_not_depend_on_its_neighbours() -> None:
    choices = [AdapterChoice(f"v{n % 3}", 1 + 5 * n % 16, 0.5) for n in range(40)]
    starts = {"v0": 0, "v1": 16, "v2": 32}
    x, a = noise(40, 100, seed=0, dtype=torch.bfloat16), noise(48, 100, seed=1, dtype=torch.bfloat16)
    b = noise(48, 24, seed=2, dtype=torch.bfloat16)
    together = torch.zeros(40, 24, dtype=torch.bfloat16)
    add_lora(x, together, a, b, lay_out(choices, starts).on(CPU))
    for row in (0, 7, 39):
        alone = torch.zeros(1, 24, dtype=torch.bfloat16)
        add_lora(x[row : row + 1], alone, a, b, lay_out([choices[row]], starts).on(CPU))
        assert torch.equal(alone[0], together[row])
