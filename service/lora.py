"""All resident adapters side by side: one masked product pair serves every adapter and every rank of a step.

Each adapter owns a range of columns, the same in every module. With the columns in use of A stacked to [columns, in] and
those of B to [columns, out], a module's output over packed rows is

    y = x W^T + ((x A^T) * mask) B

where mask [rows, columns] is scale(rank) inside the row's own adapter and rank, and 0 elsewhere. The mask is built once a
step and serves all modules, so that one copy of an adapter serves all of its ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter
from adapters.errors import InvalidAdapter
from service.core import AdapterChoice
from service.sites import Site, SiteKind, site_kind

_step: ContextVar["LoraStep | None"] = ContextVar("lora_step", default=None)


class LoraStep(Protocol):
    """How the modules of one step run."""

    def apply(self, module: "AdaptedModule", x: Tensor) -> Tensor:
        """The module's output for input `x`."""


@contextmanager
def lora_step(step: LoraStep | None) -> Iterator[None]:
    """Let every adapted module inside the block run as `step` says; None runs the base alone."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


class AdaptedModule(nn.Module):
    """Stands where a module of the base model stood, and asks the running step how to compute it.

    Made when the first adapter targets the module, so that a server of the base alone runs the model as it came.
    """

    def __init__(self, site: Site, capacity: int) -> None:
        super().__init__()
        self.base = site.module
        self.site = site
        self.a = torch.empty(0)  # [capacity, in]
        self.b = torch.empty(0)  # [capacity, out]
        self.bias_rows: dict[str, Tensor] = {}  # version -> [out], added to the output
        self.replaced: dict[str, dict[str, Tensor]] = {}  # version -> parameters that replace the base's own
        self.resize(capacity)

    def __getattr__(self, name: str) -> Any:
        # Models look at their modules' attributes (`self.fc1.weight.dtype`); answer for the module that stood here.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Tensor:
        """The base module's output with the step's adapters applied."""
        step = _step.get()
        return self.run_base(x) if step is None else step.apply(self, x)

    def run_base(self, x: Tensor) -> Tensor:
        """The base module's own output."""
        out: Tensor = self.base(x)
        return out

    def resize(self, capacity: int) -> None:
        """Make room for `capacity` columns, keeping those held."""
        if self.site.kind is not SiteKind.OTHER:
            self.a = self._grown(self.a, capacity, self.site.in_features)
            self.b = self._grown(self.b, capacity, self.site.out_features)

    def _grown(self, held: Tensor, capacity: int, features: int) -> Tensor:
        grown = self.site.weight.new_zeros(capacity, features)
        if held.numel():
            grown[: held.shape[0]] = held
        return grown


@dataclass(eq=False)
class _Resident:
    """An adapter that has columns."""

    version: str
    adapter: Adapter
    start: int
    users: int = 0

    @property
    def end(self) -> int:
        return self.start + self.adapter.config.r_max


class LoraBank:
    """The adapters that have columns, and the modules of the base model that they adapt.

    Adapters are placed when a request needs them. One without users keeps its columns until another needs the room; the
    bank grows only when the adapters in use at one time do not fit.
    """

    def __init__(self, model: nn.Module, token_embedding: nn.Module, *, columns: int = 256) -> None:
        self._model = model
        self._originals = dict(model.named_modules())  # as they were before any was adapted
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._token_embedding = token_embedding
        self._adapted: dict[str, AdaptedModule] = {}
        self._capacity = columns
        self._residents: dict[str, _Resident] = {}  # least recently acquired first
        self._active: ActiveColumns | None = None
        self.nbytes = 0
        """Bytes of all columns, used or not."""

    @property
    def resident(self) -> int:
        """Number of adapters that have columns."""
        return len(self._residents)

    def check(self, adapter: Adapter) -> None:
        """Compare an adapter with the base model. Reads shapes only, so any thread may call it.

        Raises:
            InvalidAdapter: listing every module or parameter that does not fit.
        """
        problems = list(self._misfits(adapter))
        if problems:
            raise InvalidAdapter(problems)

    def site(self, path: str) -> Site:
        """The base model's own module at `path`, whether adapted by now or not. Raises KeyError if there is none."""
        return Site(path, self._originals[path], site_kind(self._originals[path]))

    def acquire(self, version: str, adapter: Adapter) -> None:
        """Count one more user of an adapter, and give it columns if it has none."""
        resident = self._residents.pop(version, None) or self._place(version, adapter)
        self._residents[version] = resident
        resident.users += 1

    def release(self, version: str) -> None:
        """Count one user less."""
        self._residents[version].users -= 1

    def is_used(self, version: str) -> bool:
        """Whether an adapter has users."""
        return version in self._residents and self._residents[version].users > 0

    @property
    def users(self) -> int:
        """Users of all adapters."""
        return sum(resident.users for resident in self._residents.values())

    def forget(self, version: str) -> None:
        """Give up the columns of an adapter without users, if it has any."""
        if version in self._residents:
            self._evict(self._residents[version])

    def step(self, choices: Sequence[AdapterChoice | None], lengths: Sequence[int], sampled: Tensor) -> "MixedStep":
        """Lay out a mixed step: run i of `lengths[i]` packed rows uses `choices[i]`; `sampled` are the rows whose logits
        are computed.
        """
        ranks: dict[str, int] = {}
        for choice in choices:
            if choice is not None:
                ranks[choice.version] = max(choice.rank, ranks.get(choice.version, 0))
        if self._active is None or not self._active.covers(ranks):
            self._active = ActiveColumns({version: (self._residents[version].start, r) for version, r in ranks.items()})
        adapters = {version: self._residents[version].adapter for version in ranks}
        return MixedStep(self._active, adapters, choices, lengths, sampled)

    def _misfits(self, adapter: Adapter) -> Iterator[str]:
        for path, factors in adapter.modules.items():
            module = self._originals.get(path)
            if module is None:
                yield f"{path}: the base model has no such module"
                continue
            site = self.site(path)
            wanted = SiteKind.EMBEDDING if factors.is_embedding else SiteKind.LINEAR
            if site.kind is not wanted or (factors.is_embedding and module is not self._token_embedding):
                yield f"{path}: the base model's {type(module).__name__} can't take this low-rank update"
                continue
            given = (factors.a.shape[1], factors.b.shape[0])
            if given != (site.in_features, site.out_features):
                yield f"{path}: made for in, out = {given}, the base has {(site.in_features, site.out_features)}"
        for path, bias in adapter.lora_bias.items():
            if path in self._originals and bias.shape != (self.site(path).out_features,):
                yield f"{path}: its lora_bias has shape {list(bias.shape)}, the base {[self.site(path).out_features]}"
        replaced = {f"{path}.bias": bias for path, bias in adapter.base_bias.items()} | dict(adapter.saved_modules)
        for name, value in replaced.items():
            path, _, leaf = name.rpartition(".")
            parameter = (
                dict(self._originals[path].named_parameters(recurse=False)).get(leaf) if path in self._originals else None
            )
            if parameter is None:
                yield f"{name}: the base model has no such parameter"
            elif parameter.shape != value.shape:
                hint = "; a resized vocabulary needs a base model resized alike" if "embed" in name or "head" in name else ""
                yield f"{name}: has shape {list(value.shape)}, the base {list(parameter.shape)}{hint}"

    def _place(self, version: str, adapter: Adapter) -> _Resident:
        for path in touched_modules(adapter):
            if path not in self._adapted:
                self._adapted[path] = AdaptedModule(self.site(path), self._capacity)
                self._model.set_submodule(path, self._adapted[path])
        resident = _Resident(version, adapter, self._find_room(adapter.config.r_max))
        self._active = None
        for path, module in self._adapted.items():
            if module.site.kind is SiteKind.OTHER:
                continue
            columns = slice(resident.start, resident.end)
            module.a[columns] = 0  # the former owner's numbers must not shine through modules that this one leaves alone
            module.b[columns] = 0
            factors = adapter.modules.get(path)
            if factors is not None:
                module.a[resident.start : resident.start + factors.rank] = factors.a
                module.b[resident.start : resident.start + factors.rank] = factors.b.T
        for path, parameters in replaced_parameters(adapter).items():
            own = self._adapted[path].base
            self._adapted[path].replaced[version] = {k: v.to(own.get_parameter(k)) for k, v in parameters.items()}
        for path, bias in adapter.lora_bias.items():
            self._adapted[path].bias_rows[version] = bias.to(self._adapted[path].site.weight)
        self.nbytes = sum(module.a.nbytes + module.b.nbytes for module in self._adapted.values())
        return resident

    def _find_room(self, columns: int) -> int:
        """First column of a free range: existing room, else room made by evicting idle adapters, else new room."""
        idle = [resident for resident in self._residents.values() if resident.users == 0]
        while True:
            start = 0
            for resident in sorted(self._residents.values(), key=lambda each: each.start):
                if resident.start - start >= columns:
                    return start
                start = resident.end
            if self._capacity - start >= columns:
                return start
            if idle:
                self._evict(idle.pop(0))
                continue
            self._capacity = max(2 * self._capacity, start + columns)
            for module in self._adapted.values():
                module.resize(self._capacity)
            return start

    def _evict(self, resident: _Resident) -> None:
        del self._residents[resident.version]
        self._active = None
        for path in touched_modules(resident.adapter):
            self._adapted[path].bias_rows.pop(resident.version, None)
            self._adapted[path].replaced.pop(resident.version, None)


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
    ) -> None:
        self._active = active
        self._targets = frozenset(path for adapter in adapters.values() for path in adapter.modules)
        self._special = {version for version, adapter in adapters.items() if has_special_rows(adapter)}
        device = sampled.device
        table = torch.tensor(
            [
                (active.offsets[choice.version], choice.rank, choice.scale) if choice is not None else (0.0, 0.0, 0.0)
                for choice in choices
            ],
            dtype=torch.float64,
        )
        per_row = table.repeat_interleave(torch.tensor(lengths), dim=0).to(device)  # [rows, 3]
        start, rank, scale = per_row.T[:, :, None]
        column = torch.arange(active.count, device=device)
        inside = (column >= start) & (column < start + rank)
        mask = torch.where(inside, scale, 0.0).float()  # [rows, columns]
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
            flat_out.addmm_(low * rows.mask.to(low.dtype), b)
        return out


def has_special_rows(adapter: Adapter) -> bool:
    """Whether some rows need more than the masked product: replaced parameters or a bias of LoRA's own."""
    return bool(adapter.lora_bias or adapter.base_bias or adapter.saved_modules)


def replaced_parameters(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """Module path to the parameters, by their own names, that take the place of the base's."""
    replaced: dict[str, dict[str, Tensor]] = {}
    for path, bias in adapter.base_bias.items():
        replaced.setdefault(path, {})["bias"] = bias
    for name, value in adapter.saved_modules.items():
        path, _, leaf = name.rpartition(".")
        replaced.setdefault(path, {})[leaf] = value
    return replaced


def touched_modules(adapter: Adapter) -> list[str]:
    """Every module that the adapter changes in any way."""
    return sorted({*adapter.modules, *adapter.lora_bias, *replaced_parameters(adapter)})
