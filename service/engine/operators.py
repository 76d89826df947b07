"""Operators of our own for compiled graphs: what they do inside is not the compiler's business."""

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_NAMESPACE = "dylora"
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_numbers = itertools.count()
_modules: "weakref.WeakValueDictionary[int, nn.Module]" = weakref.WeakValueDictionary()


def define_operator(name: str, schema: str, run: Callable[..., Tensor], empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make an operator that no graph looks into.

    Args:
        schema: its arguments and result, in torch's notation.
        run: what it does.
        empty: its result without content, from the same arguments.
    """
    _library.define(name + schema)  # type: ignore[no-untyped-call]
    _library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{_NAMESPACE}::{name}", empty)
    operator: Any = getattr(getattr(torch.ops, _NAMESPACE), name)
    return lambda *arguments: operator(*arguments)


def number_of(module: nn.Module) -> Tensor:
    """A number by which an operator finds a module: a tensor, since graphs are made anew for another integer."""
    number = next(_numbers)
    _modules[number] = module
    return torch.tensor(number)


def module_of(number: Tensor) -> nn.Module:
    """The module that was given this number."""
    return _modules[int(number)]
