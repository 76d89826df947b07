"""The product that the kernels are made of."""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does; one of its versions warns unless it is told

import triton
import triton.language as tl
from triton import knobs

_IS_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def add_product(x, y, total):
    """`total + x @ y`, in float32 whatever the factors are; TF32 is not used for those of float32."""
    if _IS_INTERPRETED:  # it would multiply the bits of bfloat16
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")
