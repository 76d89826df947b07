"""Which rows stand in which tile of the adapters' product."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby

import torch
from torch import Tensor

from service.core import AdapterChoice
from service.engine.cuda.device_ints import ints, to_device
from service.engine.cuda.lora_kernels import TILE_INTS, TILE_ROWS, LoraTiles, add_lora

_NO_ROWS = (0, 0, *[-1] * TILE_ROWS)


@dataclass(frozen=True)
class TileLayout:
    """`LoraTiles` in the making.

    Attributes:
        tiles: each of TILE_INTS numbers.
        ranks, scales: of each row; 0 for a row without an adapter.
    """

    tiles: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def width(self) -> int:
        """The highest rank, in powers of two: a kernel is compiled for few of them."""
        highest = max((tile[1] for tile in self.tiles), default=1)
        return 1 << (max(highest, 1) - 1).bit_length()

    def padded(self, rows: int, tiles: int) -> "TileLayout":
        """The same with further rows without adapters, and further tiles without rows."""
        more = rows - len(self.ranks)
        spare = (_NO_ROWS,) * (tiles - len(self.tiles))
        return replace(self, tiles=self.tiles + spare, ranks=self.ranks + (0,) * more, scales=self.scales + (0.0,) * more)

    def on(self, device: torch.device) -> LoraTiles:
        """On the device."""
        tiles, ranks = to_device([ints(chain.from_iterable(self.tiles)), ints(self.ranks)], device)
        scales = torch.tensor(self.scales, dtype=torch.float32, device=device)
        return LoraTiles(tiles.view(-1, TILE_INTS), ranks, scales, self.width)


def lay_out(owners: Sequence[AdapterChoice | None], starts: Mapping[str, int]) -> TileLayout:
    """Put the rows that share an adapter into tiles, those of like rank together.

    Args:
        owners: each row's adapter and rank.
        starts: each adapter's first column in the bank.
    """
    owned = [(owner, row) for row, owner in enumerate(owners) if owner is not None]
    owned.sort(key=lambda each: (each[0].version, -each[0].rank, each[1]))
    tiles = []
    for version, group in groupby(owned, key=lambda each: each[0].version):
        members = list(group)
        for first in range(0, len(members), TILE_ROWS):
            rows = [row for _, row in members[first : first + TILE_ROWS]]
            tiles.append((starts[version], members[first][0].rank, *rows, *[-1] * (TILE_ROWS - len(rows))))
    ranks = tuple(0 if owner is None else owner.rank for owner in owners)
    return TileLayout(tuple(tiles), ranks, tuple(0.0 if owner is None else owner.scale for owner in owners))


class TritonProduct:
    """The adapters' product by the kernels: what a mixed step asks in the place of torch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def lay_out(self, owners: Sequence[AdapterChoice | None], starts: Mapping[str, int]) -> LoraTiles:
        """What the product needs of a step's rows, on the device."""
        return lay_out(owners, starts).on(self._device)

    def add(self, x: Tensor, out: Tensor, a: Tensor, b: Tensor, rows: LoraTiles) -> None:
        """See `add_lora`."""
        if len(rows.tiles):
            add_lora(x if x.stride(-1) == 1 else x.contiguous(), out, a, b, rows)
