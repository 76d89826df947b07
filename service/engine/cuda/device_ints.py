"""Whole numbers that a step brings to the device."""

from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def ints(numbers: Iterable[int] = ()) -> "array[int]":
    """Numbers as the device wants them: filled without a Python object for each, unlike a list."""
    return array("i", numbers)


def to_device(lists: "Sequence[array[int]]", device: torch.device) -> list[Tensor]:
    """Each of `ints` as an int32 tensor on the device; one transfer brings all of them."""
    together = ints()
    for each in lists:
        together += each
    flat = torch.frombuffer(together, dtype=torch.int32) if together else torch.empty(0, dtype=torch.int32)
    return list(torch.split(flat.to(device), [len(each) for each in lists]))
