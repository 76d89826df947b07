"""The modules of a base model that an adapter can change, behind one shape convention."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cached_property

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from service.engine.native.kernels import Kernels, can_pack, pack


class SiteKind(Enum):
    """What an adapter may do to a module."""

    LINEAR = auto()
    """nn.Linear, or GPT-2's Conv1D, whose weight is transposed."""
    EMBEDDING = auto()
    OTHER = auto()
    """Its parameters may be replaced (a bias of a norm), but it takes no low-rank update."""


@dataclass(frozen=True)
class Site:
    """One module of the base model and how to compute it with other parameters.

    Attributes:
        kernels: what computes it, if its weight is packed. Every weight that is to run in the place of its own then has to be
            packed as well, see `prepared`.
    """

    path: str
    module: nn.Module
    kind: SiteKind
    kernels: Kernels | None = None

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is stored as [in, out]."""
        return isinstance(self.module, Conv1D)

    @property
    def weight(self) -> Tensor:
        """The module's own weight."""
        return self.module.get_parameter("weight")

    @property
    def in_features(self) -> int:
        """Length of the input vector; for an embedding, the number of tokens."""
        return int(self.weight.shape[0 if self.is_transposed or self.kind is SiteKind.EMBEDDING else -1])

    @property
    def out_features(self) -> int:
        """Length of the output vector."""
        return int(self.weight.shape[-1 if self.is_transposed or self.kind is SiteKind.EMBEDDING else 0])

    @property
    def embed_scale(self) -> float:
        """Factor that the module itself puts on an embedding (Gemma: sqrt(hidden size)); 1 for all others."""
        return float(getattr(self.module, "embed_scale", 1.0))

    def run(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The module's output with `parameters` in the place of its own of the same names."""
        if self.kernels is not None:
            weight, bias = self.own
            if parameters:
                weight, bias = parameters.get("weight", weight), parameters.get("bias", bias)
            return self.kernels.linear(x, weight, bias)
        if type(self.module) is nn.Linear:  # the hot path of merged steps; the general way below takes longer
            own = self.module
            return nn.functional.linear(x, parameters.get("weight", own.weight), parameters.get("bias", own.bias))
        # A twin runs, not the module with its parameters exchanged for the time of the call, as `functional_call` has it:
        # merges and checks read them meanwhile, in threads of their own.
        twin = copy(self.module)
        twin.__dict__["_parameters"] = {**self.module._parameters, **parameters}
        result = twin(x)
        assert isinstance(result, Tensor)
        return result

    @property
    def can_pack(self) -> bool:
        """Whether the kernels can compute it."""
        return type(self.module) is nn.Linear and can_pack(self.module.weight.data)

    def packed(self, kernels: Kernels, out: Tensor) -> "Site":
        """This site with its weight packed into `out`, in the place of the one it had.

        The module itself can't run afterwards: whoever calls it must call `run`.
        """
        # A parameter of its own: the embedding that may be tied to it stays as it is.
        self.module.weight = nn.Parameter(pack(self.weight.data, out), requires_grad=False)
        return replace(self, kernels=kernels)

    def prepared(self, name: str, value: Tensor) -> Tensor:
        """A parameter in the form that `run` takes."""
        return pack(value.contiguous()) if self.kernels is not None and name == "weight" else value

    @cached_property
    def own(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a packed site: looking them up in the module takes longer than a small product."""
        return self.module.get_parameter("weight"), getattr(self.module, "bias", None)

    def delta(self, update: Tensor) -> Tensor:
        """`update` [out, in] in the layout of this module's weight."""
        return update.T if self.is_transposed or self.kind is SiteKind.EMBEDDING else update


def site_kind(module: nn.Module) -> SiteKind:
    """What an adapter may do to `module`."""
    if isinstance(module, nn.Linear | Conv1D):
        return SiteKind.LINEAR
    return SiteKind.EMBEDDING if isinstance(module, nn.Embedding) else SiteKind.OTHER
