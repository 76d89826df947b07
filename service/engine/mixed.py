"""A step of any adapters and ranks: one masked product pair serves them all.

With the columns in use of A stacked to [columns, in] and
those of B to [columns, out], a module's output over packed rows is

    y = x W^T + ((x A^T) * mask) B

where mask [rows, columns] is scale(rank) inside the row's own adapter and rank, and 0 elsewhere. The mask is built once a
step and serves all modules, so that one copy of an adapter serves all of its ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.adapter import Adapter
from service.core import AdapterChoice
from service.engine.adapted import AdaptedModule, has_special_rows
from service.engine.sites import SiteKind


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


@dataclass
class _Rows:
    """What a module needs to know of the rows it is given: all rows of the step, or those whose logits are computed."""

    mask: Tensor  # [rows, columns]
    rows_of: dict[str, Tensor] = field(default_factory=dict)  # version -> indices of its rows


class MixedStep:
    """Rows of any adapters and ranks."""

    def __init__(
        self,
        active: ActiveColumns,
        adapters: Mapping[str, Adapter],
        choices: Sequence[AdapterChoice | None],
        lengths: Sequence[int],
        sampled: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """See `LoraBank.step`; `dtype` is that of the model, in which every module multiplies the mask."""
        self._active = active
        self._targets = frozenset(path for adapter in adapters.values() for path in adapter.modules)
        self._special = {version for version, adapter in adapters.items() if has_special_rows(adapter)}
        device = sampled.device
        table = torch.tensor(
            [
                (active.offsets[choice.version], choice.rank, choice.scale) if choice is not None else (0.0, 0.0, 0.0)
                for choice in choices
            ],
            dtype=torch.float32,
        )
        per_row = table.repeat_interleave(torch.tensor(lengths), dim=0).to(device)  # [rows, 3]
        start, rank, scale = per_row.T[:, :, None]
        column = torch.arange(active.count, device=device)
        inside = (column >= start) & (column < start + rank)
        mask = torch.where(inside, scale, 0.0).to(dtype)  # [rows, columns]
        every = _Rows(mask)
        some = _Rows(mask[sampled])
        if self._special:
            owner = [choice.version if choice else "" for choice, n in zip(choices, lengths, strict=True) for _ in range(n)]
            chosen = [owner[row] for row in sampled.tolist()]
            for version in self._special:
                every.rows_of[version] = torch.tensor([i for i, v in enumerate(owner) if v == version], device=device)
                some.rows_of[version] = torch.tensor([i for i, v in enumerate(chosen) if v == version], device=device)
        # Where both have the same length they are the same rows, so the length tells which of the two a module is given.
        self._by_length = {len(some.mask): some, len(every.mask): every}

    def apply(self, module: AdaptedModule, x: Tensor) -> Tensor:
        """The base's output plus each row's own update."""
        out = module.run_base(x)
        targeted = module.site.path in self._targets
        if not (targeted or self._special):
            return out
        is_embedding = module.site.kind is SiteKind.EMBEDDING
        flat_x = x.reshape(-1) if is_embedding else x.reshape(-1, x.shape[-1])  # [rows, in], or token ids [rows]
        flat_out = out.view(-1, out.shape[-1])  # [rows, out]
        rows = self._by_length[flat_x.shape[0]]
        for version in self._special:  # before the product, which adds to what the replaced parameters give
            own = rows.rows_of[version]
            if version in module.replaced and len(own):
                flat_out[own] = module.site.run(flat_x[own], module.replaced[version])
            if version in module.bias_rows and len(own):
                flat_out[own] += module.bias_rows[version]
        if targeted:
            a, b = self._active.factors(module)
            low = a[flat_x] * module.site.embed_scale if is_embedding else flat_x @ a  # [rows, columns]
            flat_out.addmm_(low * rows.mask, b)
        return out
