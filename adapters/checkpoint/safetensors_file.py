"""Reading a safetensors file that somebody else wrote, without trusting a byte of it.

The format, as its documentation has it: eight bytes, the header's length N as a little-endian integer; N bytes
of JSON, `{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, perhaps with `__metadata__`; then the data, which the
tensors fill without a gap. The header is checked whole before any tensor is allocated, and tensors are copied out of the
file, not mapped: a mapped tensor would change, or end the process, when its file is rewritten.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from adapters.errors import AdapterTooLarge, InvalidAdapter
from adapters.limits import CheckpointLimits

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_LENGTH_BYTES = 8
_NAME = re.compile(r"[\x21-\x7e]{1,512}")
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header announces it; `begin` is in bytes from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path, limits: CheckpointLimits) -> list[TensorEntry]:
    """The tensors that the file announces, by name, once the announcement is known to be sound.

    Raises:
        AdapterTooLarge: the file or its header is over its limit, or it has too many tensors.
        InvalidAdapter: the file is not safetensors, is damaged, or has tensors of another type than F16, BF16, F32.
    """
    try:
        size = path.stat().st_size
        if size > limits.max_bytes:
            raise AdapterTooLarge([f"{path.name}: {size} bytes, the limit is {limits.max_bytes}"])
        with path.open("rb") as file:
            header, data_begin = _read_json_header(file, path.name, size, limits)
    except OSError as error:
        raise InvalidAdapter([f"{path.name}: not a readable file"]) from error
    header.pop("__metadata__", None)
    if len(header) > limits.max_tensors:
        raise AdapterTooLarge([f"{path.name}: {len(header)} tensors, the limit is {limits.max_tensors}"])
    return _entries(header, path.name, data_begin, size)


def load_tensors(path: Path, entries: Iterable[TensorEntry]) -> dict[str, Tensor]:
    """Copy tensors out of a file whose header `read_header` accepted.

    Raises:
        InvalidAdapter: the file can't be read, or ends early because somebody cut it meanwhile.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with path.open("rb") as file:
            for entry in entries:
                file.seek(entry.begin)
                buffer = bytearray(entry.nbytes)
                if file.readinto(buffer) != entry.nbytes:
                    raise InvalidAdapter([f"{path.name}: ends inside {entry.name}"])
                tensors[entry.name] = torch.frombuffer(buffer, dtype=entry.dtype).reshape(entry.shape)
    except OSError as error:
        raise InvalidAdapter([f"{path.name}: not a readable file"]) from error
    return tensors


def _read_json_header(file: BinaryIO, name: str, size: int, limits: CheckpointLimits) -> tuple[dict[str, Any], int]:
    """The header's object, and where the data begins."""
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if size < _LENGTH_BYTES + 2 or length > size - _LENGTH_BYTES:
        raise InvalidAdapter([f"{name}: not a safetensors file, or cut short ({size} bytes)"])
    if length > limits.max_header_bytes:
        raise AdapterTooLarge([f"{name}: a header of {length} bytes, the limit is {limits.max_header_bytes}"])
    raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter([f"{name}: its header is not valid JSON"]) from error
    if not isinstance(header, dict):
        raise InvalidAdapter([f"{name}: its header is not a JSON object"])
    return header, _LENGTH_BYTES + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key appears twice")
    return content


def _entries(header: dict[str, Any], file_name: str, data_begin: int, size: int) -> list[TensorEntry]:
    problems: list[str] = []
    found: list[TensorEntry] = []
    for name, fields in header.items():
        problem, entry = _entry(name, fields, data_begin)
        if problem:
            problems.append(f"{file_name}: {problem}")
        if entry:
            found.append(entry)
    if not problems:
        end = data_begin
        for entry in sorted(found, key=lambda entry: (entry.begin, entry.nbytes)):
            if entry.begin != end:
                problems.append(f"{file_name}: {entry.name} begins at byte {entry.begin}, {end} was expected")
                break
            end += entry.nbytes
        else:
            if end != size:
                problems.append(f"{file_name}: the tensors end at byte {end}, the file at {size}")
    if problems:
        raise InvalidAdapter(problems)
    return found


def _entry(name: str, fields: object, data_begin: int) -> tuple[str | None, TensorEntry | None]:
    """What is wrong with one entry, or the entry."""
    if not _NAME.fullmatch(name):
        return f"tensor name {name[:80]!a}: not 1 to 512 printable ASCII characters", None
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        return f"{name}: its header entry must have dtype, shape and data_offsets, nothing else", None
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return f"{name}: dtype {str(dtype)[:20]!a}; legal: {', '.join(_DTYPES)}", None
    if not (_is_naturals(shape) and 1 <= len(shape) <= _MAX_DIMENSIONS and all(shape)):
        return f"{name}: shape {str(shape)[:60]!a} is not 1 to {_MAX_DIMENSIONS} positive integers", None
    entry = TensorEntry(name=name, dtype=_DTYPES[dtype], shape=tuple(shape), begin=data_begin)
    if not (_is_naturals(offsets) and len(offsets) == 2 and offsets[1] - offsets[0] == entry.nbytes):
        return f"{name}: data_offsets {str(offsets)[:60]!a} do not span the {entry.nbytes} bytes of its shape", None
    return None, TensorEntry(entry.name, entry.dtype, entry.shape, data_begin + offsets[0])


def _is_naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
