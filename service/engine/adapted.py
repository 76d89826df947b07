"""The base model's modules as adapters see them: each asks the running step how to compute it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter, LowRank
from service.engine.native.kernels import PANEL, Products, Term
from service.engine.operators import define_operator, module_of, number_of
from service.engine.sites import Site

_step: ContextVar["LoraStep | None"] = ContextVar("lora_step", default=None)


class LoraStep(Protocol):
    """How the modules of one step run."""

    def apply(self, module: "AdaptedModule", x: Tensor) -> Tensor:
        """The module's output for input `x`."""


def current_step() -> LoraStep | None:
    """How the running step's modules run; None: the base alone."""
    return _step.get()


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

    Attributes:
        a: [columns, in]; no columns before the first adapter targets the module.
        b: [columns, out]; where the site's weight is packed, an adapter's columns stand as [out / PANEL, columns, PANEL].
        bias_rows: version to [out], added to the output.
        replaced: version to parameters that replace the base's own.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.base = site.module
        self.site = site
        self.a = torch.empty(0)
        self.b = torch.empty(0)
        self.bias_rows: dict[str, Tensor] = {}
        self.replaced: dict[str, dict[str, Tensor]] = {}
        self._out_features = site.out_features
        self._products: Products | None = None
        self.layout = 0
        """Counts how often `a` and `b` were replaced by others."""
        self._number = number_of(self)

    def __getattr__(self, name: str) -> Any:
        # Models look at their modules' attributes (`self.fc1.weight.dtype`); answer for the module that stood here.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Tensor:
        """The base module's output with the step's adapters applied."""
        if torch.compiler.is_compiling():
            return _module_operator(x, self._number, self._out_features)
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """The same, outside of any graph."""
        step = _step.get()
        return self.run_base(x) if step is None else step.apply(self, x)

    def run_base(self, x: Tensor) -> Tensor:
        """The base module's own output."""
        if self.site.kernels is not None:
            return self.products(x)[0]
        out: Tensor = self.base(x)
        return out

    @property
    def term(self) -> Term:
        """What the kernels are to compute, if the site's weight is packed."""
        return Term(*self.site.own, self.a, self.b)

    @property
    def products(self) -> Products:
        """The kernels' product with the base's weight and, of rows that have them, with adapters."""
        if self._products is None:
            assert self.site.kernels is not None
            self._products = self.site.kernels.products([self.term])
        return self._products

    @property
    def has_columns(self) -> bool:
        """Whether an adapter has targeted the module by now."""
        return self.a.numel() > 0

    def resize(self, columns: int) -> None:
        """Hold `columns` columns, the first of them as they are. If there is no memory for them, nothing is changed."""
        site, held = self.site, min(len(self.a), columns)
        a = site.weight.new_zeros(columns, site.in_features)
        b = site.weight.new_zeros(columns, site.out_features)
        if held:
            a[:held], b[:held] = self.a[:held], self.b[:held]
        self.a, self.b, self._products = a, b, None
        self.layout += 1

    def place(self, columns: slice, factors: LowRank | None) -> None:
        """Write an adapter into its columns. What it does not fill is zero: a former owner must not shine through."""
        a, b = self.a[columns], self.b[columns]
        a.zero_()
        b.zero_()
        if factors is not None:
            a[: factors.rank] = factors.a
            if self.site.kernels is not None:  # by panels, so that what is read together stands together
                b = b.view(-1, len(b), PANEL).transpose(0, 1)
            b[: factors.rank] = factors.b.T.reshape(factors.rank, *b.shape[1:])


def _run_module(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    module = module_of(number)
    assert isinstance(module, AdaptedModule)
    return module.compute(x)


_module_operator = define_operator(
    "module",
    "(Tensor x, Tensor number, int out_features) -> Tensor",
    _run_module,
    lambda x, number, out_features: x.new_empty(*x.shape[:-1], out_features),
)


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
