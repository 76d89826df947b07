"""Blocks of Llama's kind as the kernels compute them. See block.c."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.native.kernels import WORDS, Kernels, LoraRows, Seen, Term, members, parts_of

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a block; `window` is how many positions a row sees, `scale` that of scores, `epsilon` that of norms."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    window: int | None
    scale: float
    epsilon: float


class _Record(ctypes.Structure):
    _fields_ = [
        *members(_LONG, "hidden", "inner", "heads", "kv_heads", "dim"),
        *members(_POINTER, "keys", "values"),
        *members(_LONG, "window"),
        *members(ctypes.c_double, "scale", "epsilon"),
        ("norms", _POINTER * 4),
        *members(_POINTER, "inputs", "output", "doors", "down"),
    ]


class _Step(ctypes.Structure):
    _fields_ = members(_LONG, "rows") + members(_POINTER, "cos", "sin", "positions", "lora", "slots")


class BlockStep:
    """What a step's blocks have in common.

    Args:
        cos, sin: of the rotary embedding, [positions, dim].
        positions: of the rows, [rows].
        rows: the rows that have adapters, if any has.
        slots: where the rows' keys and values go, [rows].
    """

    def __init__(self, cos: Tensor, sin: Tensor, positions: Tensor, rows: LoraRows | None, slots: Tensor) -> None:
        self._held = (cos, sin, positions, rows, slots)
        lora = None if rows is None else rows.address
        addresses = (each.data_ptr() for each in (cos, sin, positions))
        self._record = _Step(len(slots), *addresses, lora, slots.data_ptr())
        self.address = ctypes.addressof(self._record)


class Block:
    """One block, laid out once and computed as often as asked for.

    Args:
        norms: weights of the norms of the input, of the attention's output, and of query and key heads where it has those.
        terms: query, key, value, output, gate, up, down.
        cache: keys and values, [blocks, block_tokens, kv_heads, dim].
    """

    def __init__(
        self, shape: BlockShape, norms: Sequence[Tensor | None], terms: Sequence[Term], cache: tuple[Tensor, Tensor]
    ) -> None:
        self._parts = parts_of(terms)
        self._held = (norms, terms, cache)
        first, keys_values = ctypes.addressof(self._parts), [each.data_ptr() for each in cache]
        places = [first + number * ctypes.sizeof(_LONG) * WORDS for number in (0, 3, 4, 6)]
        at_norms = (_POINTER * 4)(*(None if norm is None else norm.data_ptr() for norm in norms))
        sizes = (shape.hidden, shape.inner, shape.heads, shape.kv_heads, shape.dim)
        self._record = _Record(*sizes, *keys_values, shape.window or 0, shape.scale, shape.epsilon, at_norms, *places)
        self.address = ctypes.addressof(self._record)


class Blocks:
    """A model's blocks, one after the other, and the norm that ends them.

    Args:
        norm: its weight.
    """

    def __init__(self, kernels: Kernels, blocks: Sequence[Block], norm: Tensor) -> None:
        self._run = kernels.library.dylora_blocks
        self._blocks, self._norm = tuple(blocks), norm
        self._addresses = (_POINTER * len(blocks))(*(block.address for block in blocks))

    def run(self, x: Tensor, step: BlockStep, seen: Seen) -> None:
        """All that happens to `x` [rows, hidden], in its place; attention included, so that rows see what `seen` says."""
        self._run(
            *(ctypes.addressof(self._addresses), len(self._addresses), step.address, ctypes.addressof(seen)),
            *(self._norm.data_ptr(), x.data_ptr(), torch.get_num_threads()),
        )
