"""The base model's modules as adapters see them: each asks the running step how to compute it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter
from service.engine.sites import Site, SiteKind

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
