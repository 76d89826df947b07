"""A step of any adapters and ranks. One copy of an adapter serves all of its ranks.

Where a weight is packed, rows stand in blocks that share an adapter, and one kernel computes all blocks: rows x (own rank)
work, each adapter read once, no Python on the way. Elsewhere (other devices and formats, embeddings, no compiler) one masked
product pair of torch serves every row: with the columns in use of A stacked to [columns, in] and those of B to [columns, out]

    y = x W^T + ((x A^T) * mask) B

where mask [rows, columns] is scale(rank) inside the row's own adapter and rank, and 0 elsewhere: rows x (sum of ranks) work.
Where there is a `LoraProduct`, on a GPU, it computes what the masked pair would, from the bank's columns as they stand.
What a module needs of the step is laid out once, by the first module that asks, and serves all of them.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from adapters.adapter import Adapter
from service.core import AdapterChoice
from service.engine.adapted import AdaptedModule, has_special_rows
from service.engine.native.kernels import BLOCK_ROWS, LoraRows
from service.engine.sites import SiteKind


class LoraProduct(Protocol):
    """The adapters' product of a linear module for rows of any adapters and ranks."""

    def lay_out(self, owners: Sequence[AdapterChoice | None], starts: Mapping[str, int]) -> Any:
        """What `add` needs of a step's rows: each row's adapter and rank, and each adapter's first column in the bank."""

    def add(self, x: Tensor, out: Tensor, a: Tensor, b: Tensor, rows: Any) -> None:
        """Add each row's own update to `out` [rows, out], in place; a [columns, in] and b [columns, out] are the bank's."""


class ActiveColumns:
    """The columns that rows of the last steps use, packed one adapter after the other."""

    def __init__(self, places: Mapping[str, tuple[int, int]]) -> None:
        """`places`: version to (first column in the bank, columns in use)."""
        self.ranks = {version: rank for version, (_, rank) in places.items()}
        self.offsets: dict[str, int] = {}
        columns: list[int] = []
        for version, (start, rank) in places.items():
            self.offsets[version] = len(columns)
            columns += range(start, start + rank)
        self.count = len(columns)
        self._index = torch.tensor(columns, dtype=torch.long)
        self._packed: dict[str, tuple[Tensor, Tensor]] = {}

    def covers(self, ranks: Mapping[str, int]) -> bool:
        """Whether these columns serve a step of these adapters and ranks without too many that no row uses."""
        enough = all(self.ranks.get(version, 0) >= rank for version, rank in ranks.items())
        return enough and self.count <= 2 * sum(ranks.values())

    def factors(self, module: AdaptedModule) -> tuple[Tensor, Tensor]:
        """A as [in, columns] and B as [columns, out], copied together once for as long as this set is in use."""
        packed = self._packed.get(module.site.path)
        if packed is None:
            index = self._index.to(module.a.device)
            packed = (module.a[index].T, module.b[index])
            self._packed[module.site.path] = packed
        return packed


class _Rows:
    """What a module needs to know of the rows it is given: all rows of the step, or those whose logits are computed."""

    def __init__(
        self,
        owners: Sequence[AdapterChoice | None],
        active: ActiveColumns,
        places: Mapping[str, range],
        product: LoraProduct | None,
    ) -> None:
        """`owners`: each row's adapter and rank; `places`: each adapter's columns in the bank."""
        self._owners = owners
        self._active = active
        self._places = places
        self._product = product

    @cached_property
    def laid_out(self) -> Any:
        """What the product needs of them."""
        return None if self._product is None else self._product.lay_out(self._owners, first_columns(self._places))

    def mask(self, device: torch.device) -> Tensor:
        """[rows, columns], in float32: a scale that is rounded to the model's format changes the adapter."""
        if self._mask is None:
            self._mask = self._make_mask(device)
        return self._mask

    def of(self, version: str) -> Tensor:
        """Indices of an adapter's rows."""
        return torch.tensor([row for row, owner in enumerate(self._owners) if owner is not None and owner.version == version])

    @cached_property
    def blocks(self) -> LoraRows:
        """The rows that have adapters, by adapter and descending rank, cut into blocks."""
        order = sorted(
            (row for row, owner in enumerate(self._owners) if owner is not None),
            key=lambda row: (self._version(row), -self._choice(row).rank, row),
        )
        blocks = [
            rows[first : first + BLOCK_ROWS]
            for rows in (list(group) for _, group in groupby(order, self._version))
            for first in range(0, len(rows), BLOCK_ROWS)
        ]
        padded = [[*rows, *[rows[0]] * (BLOCK_ROWS - len(rows))] for rows in blocks]
        return LoraRows(
            counts=torch.tensor([len(rows) for rows in blocks]),
            starts=torch.tensor([self._places[self._version(rows[0])].start for rows in blocks]),
            widths=torch.tensor([len(self._places[self._version(rows[0])]) for rows in blocks]),
            ranks=torch.tensor([self._choice(rows[0]).rank for rows in blocks]),
            rows=torch.tensor(padded),
            row_ranks=torch.tensor([[self._choice(row).rank for row in rows] for rows in padded]),
            scales=torch.tensor([[self._choice(row).scale for row in rows] for rows in padded], dtype=torch.float32),
        )

    _mask: Tensor | None = None

    def _make_mask(self, device: torch.device) -> Tensor:
        nothing = (0.0, 0.0, 0.0)
        per_row = torch.tensor(
            [nothing if each is None else (self._active.offsets[each.version], each.rank, each.scale) for each in self._owners],
            device=device,
            dtype=torch.float32,
        )  # [rows, 3]
        start, rank, scale = per_row.T[:, :, None]
        column = torch.arange(self._active.count, device=device)
        return torch.where((column >= start) & (column < start + rank), scale, 0.0)

    def _choice(self, row: int) -> AdapterChoice:
        owner = self._owners[row]
        assert owner is not None
        return owner

    def _version(self, row: int) -> str:
        return self._choice(row).version


def first_columns(places: Mapping[str, range]) -> dict[str, int]:
    """Where each adapter's columns begin in the bank."""
    return {version: place.start for version, place in places.items()}


class MixedStep:
    """Rows of any adapters and ranks."""

    def __init__(
        self,
        active: ActiveColumns,
        adapters: Mapping[str, Adapter],
        places: Mapping[str, range],
        choices: Sequence[AdapterChoice | None],
        lengths: Sequence[int],
        kept: Tensor,
        *,
        product: LoraProduct | None = None,
        generation: int = 0,
    ) -> None:
        """See `LoraBank.step`; `places` are the adapters' columns in the bank."""
        self._active = active
        self._product = product
        self.starts = first_columns(places)
        self.generation = generation
        """Of the bank: while it is the same, no column has moved and no other module was adapted."""
        self._targets = frozenset(path for adapter in adapters.values() for path in adapter.modules)
        self._special = {version for version, adapter in adapters.items() if has_special_rows(adapter)}
        owners = [choice for choice, length in zip(choices, lengths, strict=True) for _ in range(length)]
        self.owners = owners
        every = _Rows(owners, active, places, product)
        # Where both have the same length they are the same rows, so the length tells which of the two a module is given.
        last = every if len(kept) == len(owners) else _Rows([owners[row] for row in kept.tolist()], active, places, product)
        self._by_length = {len(kept): last, len(owners): every}
        embeddings = (each.is_embedding for adapter in adapters.values() for each in adapter.modules.values())
        self.is_plain = not self._special and not any(embeddings)
        """Whether the product of linear modules is all that the step's adapters ask for."""

    def rows(self, count: int) -> LoraRows:
        """The step's rows that have adapters, or those of its `count` rows whose logits are computed."""
        return self._by_length[count].blocks

    def apply(self, module: AdaptedModule, x: Tensor) -> Tensor:
        """The base's output plus each row's own update."""
        targeted = module.site.path in self._targets
        special = [version for version in self._special if version in module.replaced or version in module.bias_rows]
        if not (targeted or special):  # also of modules that are given other rows than the step's, which none may change
            return module.run_base(x)
        is_embedding = module.site.kind is SiteKind.EMBEDDING
        flat_x = x.reshape(-1) if is_embedding else x.reshape(-1, x.shape[-1])  # [rows, in], or token ids [rows]
        rows = self._by_length[flat_x.shape[0]]
        if module.site.kernels is not None and not special:
            return module.products(x, rows.blocks)[0]
        out = module.run_base(x)
        flat_out = out.view(-1, out.shape[-1])  # [rows, out]
        for version in special:  # before the product, which adds to what the replaced parameters give
            own = rows.of(version)
            if version in module.replaced and len(own):
                flat_out[own] = module.site.run(flat_x[own], module.replaced[version])
            if version in module.bias_rows and len(own):
                flat_out[own] += module.bias_rows[version]
        if not targeted:
            return out
        if module.site.kernels is not None:
            module.site.kernels.add_lora(flat_x, flat_out, module.a, module.b, rows.blocks)
            return out
        if self._product is not None and not is_embedding:
            self._product.add(flat_x, flat_out, module.a, module.b, rows.laid_out)
            return out
        a, b = self._active.factors(module)
        low = a[flat_x] * module.site.embed_scale if is_embedding else flat_x @ a  # [rows, columns]
        flat_out.addmm_((low * rows.mask(low.device)).to(low.dtype), b)
        return out
