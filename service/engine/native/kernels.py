"""The kernels as functions of tensors. All are float32 on the CPU, contiguous unless said otherwise.

The base's product beside others, on 75M weights of a 100M Llama, milliseconds of one core's time, 1 / 4 / 8 / 16 / 32 / 128
rows: these kernels 20 / 25 / 35 / 47 / 90 / 297; oneDNN with packed weights 24 / 40 / 50 / 67 / 101 / 292; MKL, which
torch's `linear` calls, 23 / 59 / 67 / 92 / 124 / 313. MKL with packed weights was not faster than without.
"""

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.native.build import built_library

PANEL = 16
"""Outputs that stand together in a packed weight."""
BLOCK_ROWS = 4
"""Most rows that the adapters' product takes together."""
LANES = 8
"""Dimensions of a head must be a multiple of this."""

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "dylora_linear": [*[_POINTER] * 4, *[_LONG] * 3, _INT],
    "dylora_add_lora": [*[_POINTER] * 4, *[_LONG] * 4, *[_POINTER] * 6, _INT],
    "dylora_merge": [*[_POINTER] * 3, _LONG, _FLOAT, *[_LONG] * 4, _POINTER],
    "dylora_write_cache": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG, _POINTER, *[_LONG] * 4, _POINTER, _POINTER],
    "dylora_attend": [
        *[_POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _POINTER],
        *[_LONG] * 7,
        *[_FLOAT, _FLOAT, _INT],
    ],
    "dylora_argmax": [_POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT],
}


def can_pack(weight: Tensor) -> bool:
    """Whether a weight [out, in] may be packed."""
    is_float = weight.dtype is torch.float32 and weight.device.type == "cpu"
    return is_float and weight.ndim == 2 and weight.shape[0] % PANEL == 0 and weight.is_contiguous()


def pack(weight: Tensor) -> Tensor:
    """A weight [out, in] in panels, in a tensor of the same shape: element [16 p + j, k] stands at 16 p in + 16 k + j."""
    out_features, in_features = weight.shape
    panels = weight.view(out_features // PANEL, PANEL, in_features).transpose(1, 2).contiguous()
    return panels.view(out_features, in_features)


def unpack(packed: Tensor) -> Tensor:
    """The weight that `pack` was given."""
    out_features, in_features = packed.shape
    return packed.view(out_features // PANEL, in_features, PANEL).transpose(1, 2).reshape(out_features, in_features)


@dataclass(frozen=True)
class LoraRows:
    """The rows of a step that have adapters, in blocks of up to BLOCK_ROWS that share one. All int64 but `scales`."""

    counts: Tensor  # [blocks], rows in use
    starts: Tensor  # [blocks], first column in the bank
    ranks: Tensor  # [blocks], the highest of its rows
    rows: Tensor  # [blocks, BLOCK_ROWS]
    row_ranks: Tensor  # [blocks, BLOCK_ROWS]
    scales: Tensor  # [blocks, BLOCK_ROWS], float32


class Kernels:
    """The library, loaded. As many threads as torch uses take part."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x` [..., in] times a packed weight; [..., out]."""
        out_features, in_features = weight.shape
        x = x.contiguous()
        rows = x.numel() // in_features
        out = x.new_empty(*x.shape[:-1], out_features)
        at_bias = None if bias is None else bias.data_ptr()
        self._library.dylora_linear(
            x.data_ptr(), weight.data_ptr(), at_bias, out.data_ptr(), rows, in_features, out_features, torch.get_num_threads()
        )
        return out

    def add_lora(self, x: Tensor, out: Tensor, a: Tensor, b: Tensor, rows: LoraRows) -> None:
        """Add each row's own update to `out` [rows, out], in place.

        Args:
            x: [rows, in].
            a: [columns, in], the bank's.
            b: [out / PANEL, columns, PANEL], the bank's.
        """
        x = x.contiguous()
        self._library.dylora_add_lora(
            *(x.data_ptr(), out.data_ptr(), a.data_ptr(), b.data_ptr(), a.shape[1], out.shape[1], a.shape[0]),
            *(len(rows.counts), rows.counts.data_ptr(), rows.starts.data_ptr(), rows.ranks.data_ptr()),
            *(rows.rows.data_ptr(), rows.row_ranks.data_ptr(), rows.scales.data_ptr(), torch.get_num_threads()),
        )

    def merge(self, weight: Tensor, a: Tensor, b: Tensor, scale: float, out: Tensor, panels: range) -> None:
        """`weight + scale * b @ a` for some panels of a packed weight, into `out`; a [rank, in], b [out, rank]."""
        rank, in_features = a.shape
        self._library.dylora_merge(
            *(weight.data_ptr(), a.data_ptr(), b.data_ptr(), b.stride(0), scale, rank, in_features),
            *(panels.start, panels.stop, out.data_ptr()),
        )

    def write_cache(self, key: Tensor, value: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [kv_heads, rows, dim], dense in their last dimension, into slots of a layer's cache."""
        heads, rows, dim = key.shape
        self._library.dylora_write_cache(
            *(key.data_ptr(), key.stride(1), key.stride(0), value.data_ptr(), value.stride(1), value.stride(0)),
            *(slots.data_ptr(), rows, heads, dim, value.shape[2], keys.data_ptr(), values.data_ptr()),
        )

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        *,
        rows: Tensor,
        ends: Tensor,
        tables: Tensor,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Attention of rows that each see their own sequence up to themselves, written to the same rows of `out`.

        Args:
            query: [heads, all rows, dim], dense in its last dimension.
            keys, values: a layer's cache [blocks, block_tokens, kv_heads, dim].
            out: [all rows, heads, value_dim].
            rows, ends: [rows], int64: which rows, and how many positions each sees.
            tables: [rows, most blocks], int64: the blocks of each row's sequence.
        """
        self._library.dylora_attend(
            *(query.data_ptr(), query.stride(1), query.stride(0), keys.data_ptr(), values.data_ptr(), out.data_ptr()),
            *(len(rows), rows.data_ptr(), ends.data_ptr(), tables.data_ptr(), tables.shape[1]),
            *(query.shape[0], keys.shape[2], keys.shape[3], values.shape[3], keys.shape[1]),
            *(window or 0, scale, softcap or 0.0, torch.get_num_threads()),
        )

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The first maximum of each row of `logits` [rows, vocabulary] and the row's logsumexp; [rows] and [rows]."""
        ids = torch.empty(len(logits), dtype=torch.long)
        normalisers = torch.empty(len(logits))
        self._library.dylora_argmax(
            logits.data_ptr(), *logits.shape, ids.data_ptr(), normalisers.data_ptr(), torch.get_num_threads()
        )
        return ids, normalisers


@functools.cache
def kernels() -> Kernels | None:
    """The kernels for this processor; None where there is no compiler to build them."""
    library = built_library()
    return None if library is None else Kernels(ctypes.CDLL(str(library)))
