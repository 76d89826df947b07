"""The kernels as functions of tensors. All are float32 on the CPU, contiguous unless said otherwise.

How long the products take beside torch's is measured by `make bench ARGS="--sweeps products"`.
"""

import ctypes
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from service.engine.native.build import built_libraries
from service.engine.native.prebuilt import prebuilt_library

log = logging.getLogger(__name__)

PANEL = 16
"""Outputs that stand together in a packed weight."""
BLOCK_ROWS = 4
"""Most rows that the adapters' product takes together."""
LANES = 8
"""Dimensions of a head must be a multiple of this."""
PIECE_ROWS = 32
"""Rows of a prompt that are attended together: more read keys less often, fewer are shared more evenly among threads."""

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "dylora_products": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _INT],
    "dylora_blocks": [_POINTER, _LONG, *[_POINTER] * 4, _INT],
    "dylora_use_huge_pages": [_POINTER, _LONG],
    "dylora_merge": [*[_POINTER] * 3, _LONG, _FLOAT, *[_LONG] * 4, _POINTER],
    "dylora_write_cache": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG, _POINTER, *[_LONG] * 4, _POINTER, _POINTER],
    "dylora_attend": [_POINTER, _INT],
    "dylora_argmax": [_POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT],
}


def can_pack(weight: Tensor) -> bool:
    """Whether a weight [out, in] may be packed."""
    is_float = weight.dtype is torch.float32 and weight.device.type == "cpu"
    return is_float and weight.ndim == 2 and weight.shape[0] % PANEL == 0 and weight.is_contiguous()


def pack(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """A weight [out, in] in panels, in a tensor of the same shape: element [16 p + j, k] stands at 16 p in + 16 k + j."""
    out = torch.empty_like(weight) if out is None else out
    out_features, in_features = weight.shape
    panels = weight.view(out_features // PANEL, PANEL, in_features).transpose(1, 2)
    out.view(panels.shape).copy_(panels)
    return out


def unpack(packed: Tensor) -> Tensor:
    """The weight that `pack` was given."""
    out_features, in_features = packed.shape
    return packed.view(out_features // PANEL, in_features, PANEL).transpose(1, 2).reshape(out_features, in_features)


@dataclass(frozen=True)
class LoraRows:
    """The rows of a step that have adapters, in blocks of up to BLOCK_ROWS that share one. All int64 but `scales`."""

    counts: Tensor  # [blocks], rows in use
    starts: Tensor  # [blocks], first column in the bank
    widths: Tensor  # [blocks], columns of the adapter, used or not
    ranks: Tensor  # [blocks], the highest of its rows
    rows: Tensor  # [blocks, BLOCK_ROWS]
    row_ranks: Tensor  # [blocks, BLOCK_ROWS]
    scales: Tensor  # [blocks, BLOCK_ROWS], float32

    @cached_property
    def address(self) -> int:
        """Where the kernels find all of it."""
        columns = (self.counts, self.starts, self.widths, self.ranks, self.rows, self.row_ranks, self.scales)
        self.__dict__["_held"] = held = (ctypes.c_long * 8)(len(self.counts), *(column.data_ptr() for column in columns))
        return ctypes.addressof(held)


class Term(NamedTuple):
    """What one product of a row is made of."""

    weight: Tensor  # [out, in], packed
    bias: Tensor | None = None  # [out]
    a: Tensor | None = None  # [columns, in], the bank's; None: no adapter changes it
    b: Tensor | None = None  # [columns, out], the bank's: of each adapter [out / PANEL, its columns, PANEL]


WORDS = 7
"""Of `struct part`: weight, bias, what it is added to, output, A, B, length of the output."""
_OUTPUT = 3


def parts_of(terms: Sequence[Term]) -> "ctypes.Array[ctypes.c_long]":
    """The terms as the kernels read them. Their tensors must outlive it."""
    words: list[int] = []
    for term in terms:
        weight, bias, a, b = (0 if each is None or not each.numel() else each.data_ptr() for each in term)
        words += [weight, bias, 0, 0, a, b, len(term.weight)]
    return (ctypes.c_long * len(words))(*words)


class Products:
    """Products of one input with several packed weights, laid out once and computed as often as asked for."""

    def __init__(self, library: ctypes.CDLL, terms: Sequence[Term]) -> None:
        self._run = library.dylora_products
        self._terms = tuple(terms)
        self._parts = parts_of(terms)
        self._address = ctypes.addressof(self._parts)

    def __call__(self, x: Tensor, rows: LoraRows | None = None) -> list[Tensor]:
        """The products of `x` [..., in], each [..., out], with what the adapters of `rows` add."""
        x = x.contiguous()
        *shape, in_features = x.shape
        outs = [x.new_empty(*shape, len(term.weight)) for term in self._terms]
        for number, out in enumerate(outs):
            self._parts[WORDS * number + _OUTPUT] = out.data_ptr()
        self._run(
            *(x.data_ptr(), x.numel() // in_features, in_features, self._address, len(outs)),
            *(None if rows is None else rows.address, torch.get_num_threads()),
        )
        return outs


def members(kind: Any, *names: str) -> list[tuple[str, Any]]:
    """Members of a structure that are of one kind."""
    return [(name, kind) for name in names]


class Seen(ctypes.Structure):
    """What rows see of their own sequences."""

    held: tuple[Tensor, ...]
    _fields_ = (
        members(_LONG, "pieces", "rows")
        + members(_POINTER, "query_rows", "lengths", "ends", "starts", "blocks")
        + members(_LONG, "block_tokens")
    )

    @classmethod
    def of(
        cls, pieces: int, rows: Tensor, lengths: Tensor, ends: Tensor, starts: Tensor, blocks: Tensor, block_tokens: int
    ) -> "Seen":
        """Of `pieces` pieces of consecutive rows, of at most PIECE_ROWS, and then of single rows; all int64.

        Args:
            rows, lengths: the first row of each, and how many, [n].
            ends: positions that its last row sees, [n]; the row before it sees one less.
            starts: where in `blocks` those that hold them begin, [n]; one after the other, so that a long context does not
                cost those beside it.
        """
        columns = (rows, lengths, ends, starts, blocks)
        seen = cls(pieces, len(rows) - pieces, *(each.data_ptr() for each in columns), block_tokens)
        seen.held = columns
        return seen


class _Attention(ctypes.Structure):
    _fields_ = [
        *members(_POINTER, "query"),
        *members(_LONG, "query_row", "query_head"),
        *members(_POINTER, "keys", "values", "out"),
        *members(_LONG, "heads", "kv_heads", "dim", "value_dim", "window"),
        *members(_FLOAT, "scale", "softcap"),
        ("seen", Seen),
    ]


class Kernels:
    """The library, loaded. As many threads as torch uses take part."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None

    def empty(self, *shape: int) -> Tensor:
        """Memory for many weights, in large pages where the system has them; float32."""
        return self.in_large_pages(torch.empty(*shape))

    def in_large_pages(self, fresh: Tensor) -> Tensor:
        """The same memory, which nothing has been written to yet, in large pages where the system has them."""
        self.library.dylora_use_huge_pages(fresh.data_ptr(), fresh.nbytes)
        return fresh

    def products(self, terms: Sequence[Term]) -> Products:
        """Lay out products of one input."""
        return Products(self.library, terms)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x` [..., in] times a packed weight; [..., out]."""
        return self.products([Term(weight, bias)])(x)[0]

    def add_lora(self, x: Tensor, out: Tensor, a: Tensor, b: Tensor, rows: LoraRows) -> None:
        """Add each row's own update to `out` [rows, out], in place; `a` and `b` as in `Term`."""
        x = x.contiguous()
        part = (ctypes.c_long * WORDS)(0, 0, 0, out.data_ptr(), a.data_ptr(), b.data_ptr(), out.shape[-1])
        self.library.dylora_products(
            *(x.data_ptr(), *x.shape, ctypes.addressof(part), 1, rows.address, torch.get_num_threads())
        )

    def merge(self, weight: Tensor, a: Tensor, b: Tensor, scale: float, out: Tensor, panels: range) -> None:
        """`weight + scale * b @ a` for some panels of a packed weight, into `out`; a [rank, in], b [out, rank]."""
        rank, in_features = a.shape
        self.library.dylora_merge(
            *(weight.data_ptr(), a.data_ptr(), b.data_ptr(), b.stride(0), scale, rank, in_features),
            *(panels.start, panels.stop, out.data_ptr()),
        )

    def write_cache(self, key: Tensor, value: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [kv_heads, rows, dim], dense in their last dimension, into slots of a layer's cache."""
        heads, rows, dim = key.shape
        self.library.dylora_write_cache(
            *(key.data_ptr(), key.stride(1), key.stride(0), value.data_ptr(), value.stride(1), value.stride(0)),
            *(slots.data_ptr(), rows, heads, dim, value.shape[2], keys.data_ptr(), values.data_ptr()),
        )

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        seen: Seen,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Attention of rows that each see their own sequence up to themselves, written to the same rows of `out`.

        Args:
            query: [heads, all rows, dim], dense in its last dimension.
            keys, values: a layer's cache [blocks, block_tokens, kv_heads, dim].
            out: [all rows, heads, value_dim].
        """
        attention = _Attention(
            *(query.data_ptr(), query.stride(1), query.stride(0), keys.data_ptr(), values.data_ptr(), out.data_ptr()),
            *(query.shape[0], keys.shape[2], keys.shape[3], values.shape[3], window or 0, scale, softcap or 0.0, seen),
        )
        self.library.dylora_attend(ctypes.byref(attention), torch.get_num_threads())

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The first maximum of each row of `logits` [rows, vocabulary] and the row's logsumexp; [rows] and [rows]."""
        ids = torch.empty(len(logits), dtype=torch.long)
        normalisers = torch.empty(len(logits))
        self.library.dylora_argmax(
            logits.data_ptr(), *logits.shape, ids.data_ptr(), normalisers.data_ptr(), torch.get_num_threads()
        )
        return ids, normalisers


@functools.cache
def kernels() -> Kernels | None:
    """The kernels for this processor; None, with the reasons in the log, where no library can be built or loaded."""
    for library in _libraries():
        try:
            return Kernels(ctypes.CDLL(str(library)))
        except OSError as error:  # a folder of which nothing may run, or a machine without what the library needs
            log.warning("kernels can't be loaded: %s", error)
    log.info("products run by torch alone, slower")
    return None


def _libraries() -> Iterator[Path]:
    """All that may serve, best first; each is built when it is asked for."""
    yield from built_libraries()
    if (ahead := prebuilt_library()) is not None:
        yield ahead
