"""The kernels as this processor has them, and with vectors of the width that others have, which the compiler makes up."""

import ctypes
import shutil
import tempfile
from functools import cache
from pathlib import Path

from service.engine.native.build import COMPILERS, build, instructions
from service.engine.native.kernels import Kernels, kernels

WIDTHS = ("own width", "other width")


@cache
def kernels_of(width: str) -> Kernels:
    """Of one of WIDTHS; where there is a compiler."""
    found = kernels()
    assert found is not None
    if width == "own width":
        return found
    lanes = 8 if b"avx512f" in instructions() else 16
    compiler = next(filter(None, map(shutil.which, COMPILERS)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.so"
        build(compiler, path, f"-DLANES={lanes}", "-Wno-psabi")
        return Kernels(ctypes.CDLL(str(path)))
