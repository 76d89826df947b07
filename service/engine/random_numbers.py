"""Random numbers without state, so that a sequence draws the same ones whatever step or batch it finds itself in."""

from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def as_int64(number: int) -> int:
    """The signed number with the low 64 bits of `number`."""
    low = number & ((1 << 64) - 1)
    return low - (1 << 64) if low >> 63 else low


def uniform_numbers(seeds: Tensor, indices: Tensor) -> Tensor:
    """The `indices[i]`-th number in [0, 1) of the stream `seeds[i]`, in float32.

    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) in counter mode. 24 bits, so exact in float32, in which the distribution is
    summed. The products are meant to overflow: int64 arithmetic wraps, and gives the bits of the unsigned one.

    Args:
        seeds, indices: int64, of one shape.
    """
    z = _mix(_mix(seeds) + (indices + 1) * as_int64(_GAMMA))
    return _shift(z, 40).float() * 2.0**-24


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * as_int64(_MULTIPLIERS[0])
    z = (z ^ _shift(z, 27)) * as_int64(_MULTIPLIERS[1])
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shifted right as an unsigned number."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
