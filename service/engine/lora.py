"""The adapters that have columns: all resident adapters side by side in every module that they adapt.

Each adapter owns a range of columns, the same in every module, and its first columns serve its lower ranks: one copy of an
adapter serves all of them.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter
from adapters.errors import InvalidAdapter
from service.core import AdapterChoice
from service.engine.adapted import AdaptedModule, replaced_parameters, touched_modules
from service.engine.mixed import ActiveColumns, LoraProduct, MixedStep
from service.engine.native.kernels import Kernels
from service.engine.sites import Site, SiteKind, site_kind

_NOT_ADAPTABLE = "the base model does not compute it row by row, one for each token, so no adapter can change it"


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

    @property
    def columns(self) -> range:
        return range(self.start, self.end)


class LoraBank:
    """The adapters that have columns, and the modules of the base model that they adapt.

    Adapters are placed when a request needs them. One without users keeps its columns until another needs the room; the
    bank grows only when the adapters in use at one time do not fit. When nobody uses any, and those that have columns need
    less than a quarter of them, all columns are given back.
    """

    def __init__(
        self,
        model: nn.Module,
        token_embedding: nn.Module,
        *,
        adaptable: Collection[str] | None = None,
        columns: int = 256,
        kernels: Kernels | None = None,
        product: LoraProduct | None = None,
    ) -> None:
        """With `kernels`, the weights that they can compute are packed: from then on the model runs through the bank.

        Args:
            adaptable: paths of the modules that adapters may change, see `LoadedModel`; all of them unless given.
            product: computes mixed steps where the weights are not packed.
        """
        self._product = product
        self._generation = 0
        self._last_step: tuple[object, MixedStep] | None = None
        self._model = model
        self._originals = dict(model.named_modules())  # as they were before any was adapted
        self._adaptable = frozenset(self._originals if adaptable is None else adaptable)
        # Their shapes alone: the weights themselves are freed when they are packed.
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        self._token_embedding = token_embedding
        self._adapted: dict[str, AdaptedModule] = {}
        self._packed: dict[str, Site] = {}
        self._least_capacity = columns
        self._capacity = columns
        self._residents: dict[str, _Resident] = {}  # least recently acquired first
        self._active: ActiveColumns | None = None
        self.nbytes = 0
        """Bytes of all columns, used or not."""
        if kernels is not None:
            self._pack(kernels)

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
        return self._packed.get(path) or Site(path, self._originals[path], site_kind(self._originals[path]))

    def adapt(self, path: str) -> AdaptedModule:
        """Put a module in the place of the base's own that can apply adapters, if it does not stand there yet."""
        if path not in self._adapted:
            self._adapted[path] = AdaptedModule(self.site(path))
            self._model.set_submodule(path, self._adapted[path])
            self._generation += 1
        return self._adapted[path]

    def adapt_linear(self, under: Iterable[str]) -> None:
        """Adapt every linear module below these paths before an adapter asks for it, so that compiled code stays right."""
        inside = tuple(f"{path}." for path in under)
        for path, module in self._originals.items():
            if path.startswith(inside) and path in self._adaptable and site_kind(module) is SiteKind.LINEAR:
                self.adapt(path)

    def linear_modules(self) -> dict[str, tuple[int, int]]:
        """Paths of the linear modules inside the blocks, those in a numbered list of modules, with their (in, out)."""
        inside = (path for path in self._originals if any(part.isdigit() for part in path.split(".")))
        sites = (self.site(path) for path in inside if path in self._adaptable)
        return {site.path: (site.in_features, site.out_features) for site in sites if site.kind is SiteKind.LINEAR}

    def acquire(self, version: str, adapter: Adapter) -> None:
        """Count one more user of an adapter, and give it columns if it has none.

        Raises:
            RuntimeError: there is no memory for them. All other adapters stay as they are.
        """
        resident = self._residents.pop(version, None) or self._place(version, adapter)
        self._residents[version] = resident
        resident.users += 1

    def release(self, version: str) -> None:
        """Count one user less."""
        self._residents[version].users -= 1
        self._give_back()

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
            self._give_back()

    def step(self, choices: Sequence[AdapterChoice | None], lengths: Sequence[int], kept: Tensor) -> MixedStep:
        """Lay out a mixed step: run i of `lengths[i]` packed rows uses `choices[i]`; `kept` are the rows whose logits are
        computed, ascending. While the same sequences generate, their steps are alike, and one layout serves them.
        """
        key = (self._generation, tuple(choices), tuple(lengths), tuple(kept.tolist()))
        if self._last_step is None or self._last_step[0] != key:
            self._last_step = key, self._lay_out(choices, lengths, kept)
        return self._last_step[1]

    def _lay_out(self, choices: Sequence[AdapterChoice | None], lengths: Sequence[int], kept: Tensor) -> MixedStep:
        ranks: dict[str, int] = {}
        for choice in choices:
            if choice is not None:
                ranks[choice.version] = max(choice.rank, ranks.get(choice.version, 0))
        places = {version: self._residents[version].columns for version in ranks}
        if self._active is None or not self._active.covers(ranks):
            self._active = ActiveColumns({version: (places[version].start, rank) for version, rank in ranks.items()})
        adapters = {version: self._residents[version].adapter for version in ranks}
        return MixedStep(
            *(self._active, adapters, places, choices, lengths, kept), product=self._product, generation=self._generation
        )

    def _misfits(self, adapter: Adapter) -> Iterator[str]:
        for path, factors in adapter.modules.items():
            module = self._originals.get(path)
            if module is None:
                yield f"{path}: the base model has no such module"
                continue
            if path not in self._adaptable:
                yield f"{path}: {_NOT_ADAPTABLE}"
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
            if path in self._adaptable and bias.shape != (self.site(path).out_features,):
                yield f"{path}: its lora_bias has shape {list(bias.shape)}, the base {[self.site(path).out_features]}"
        replaced = {f"{path}.bias": bias for path, bias in adapter.base_bias.items()} | dict(adapter.saved_modules)
        for name, value in replaced.items():
            shape = self._shapes.get(name)
            if shape is None:
                yield f"{name}: the base model has no such parameter"
            elif name.rpartition(".")[0] not in self._adaptable:
                yield f"{name}: {_NOT_ADAPTABLE}"
            elif shape != value.shape:
                is_resized = value.ndim == 2 and value.shape[1:] == shape[1:]
                hint = " (is its vocabulary resized? then the base must be, too)" if is_resized else ""
                yield f"{name}: has shape {list(value.shape)}, the base {list(shape)}{hint}"

    def _pack(self, kernels: Kernels) -> None:
        sites = [site for site in map(self.site, self._originals) if site.can_pack]
        held = kernels.empty(sum(site.weight.numel() for site in sites))
        for site, part in zip(sites, torch.split(held, [site.weight.numel() for site in sites]), strict=True):
            self._packed[site.path] = site.packed(kernels, part.view_as(site.weight))
            self.adapt(site.path)

    def _place(self, version: str, adapter: Adapter) -> _Resident:
        resident = _Resident(version, adapter, self._find_room(adapter.config.r_max))
        modules = {path: self.adapt(path) for path in touched_modules(adapter)}
        self._grow(max(self._capacity, resident.end), adapter.modules)
        self._active = None
        for path, module in self._adapted.items():
            if module.has_columns:
                module.place(slice(resident.start, resident.end), adapter.modules.get(path))
        # All are made before any is kept: memory that ends in between must not leave some behind for good.
        replaced = {}
        for path, parameters in replaced_parameters(adapter).items():
            site = modules[path].site
            own = site.module.get_parameter
            replaced[path] = {name: site.prepared(name, value.to(own(name))) for name, value in parameters.items()}
        bias_rows = {path: bias.to(modules[path].site.weight) for path, bias in adapter.lora_bias.items()}
        for path in replaced:
            modules[path].replaced[version] = replaced[path]
        for path in bias_rows:
            modules[path].bias_rows[version] = bias_rows[path]
        return resident

    def _find_room(self, columns: int) -> int:
        """First column of a free range: existing room, else room made by evicting idle adapters, else new room, past
        `_capacity`.
        """
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
            return start

    def _grow(self, columns: int, paths: Collection[str]) -> None:
        """Give the modules at `paths`, and those that have columns, so many: twice as many as before if they had fewer.

        One module after the other, so that the old and the new columns of all are never held at once. Where memory ends in
        between, `_capacity` stays what every module has, and what some have beyond it is not used.
        """
        columns = columns if columns <= self._capacity else max(columns, 2 * self._capacity)
        wanting = [module for path, module in self._adapted.items() if module.has_columns or path in paths]
        try:
            for module in wanting:
                if len(module.a) < columns:
                    self._generation += 1
                    module.resize(columns)
        finally:
            self._count_bytes()
        self._capacity = columns

    def _count_bytes(self) -> None:
        self.nbytes = sum(module.a.nbytes + module.b.nbytes for module in self._adapted.values())

    def _give_back(self) -> None:
        """Hold no columns if there are too many and nobody uses them. Adapters without users are placed anew when needed."""
        if self._capacity == self._least_capacity or self.users:
            return
        if 4 * sum(len(resident.columns) for resident in self._residents.values()) < self._capacity:
            for resident in list(self._residents.values()):
                self._evict(resident)
            for module in self._adapted.values():
                module.resize(0)
            self._capacity = self._least_capacity
            self._generation += 1
            self._count_bytes()

    def _evict(self, resident: _Resident) -> None:
        del self._residents[resident.version]
        self._active = self._last_step = None
        for path in touched_modules(resident.adapter):
            self._adapted[path].bias_rows.pop(resident.version, None)
            self._adapted[path].replaced.pop(resident.version, None)
