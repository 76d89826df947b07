"""Kernels built ahead, for machines without a compiler: one library for each level of x86-64 that repays it.

    python -m service.engine.native.prebuilt      builds them beside the sources; the Dockerfile does

The levels are those of the x86-64 psABI, which compilers know by these names.
"""

import logging
import platform
import shutil
from pathlib import Path

from service.engine.native.build import COMPILERS, build, instructions

log = logging.getLogger(__name__)

FOLDER = Path(__file__).with_name("prebuilt")
_AVX2 = {b"avx", b"avx2", b"bmi1", b"bmi2", b"f16c", b"fma", b"abm", b"movbe"}
_AVX512 = {b"avx512f", b"avx512bw", b"avx512cd", b"avx512dq", b"avx512vl"}
LEVELS = {"x86-64-v4": _AVX2 | _AVX512, "x86-64-v3": _AVX2}
"""The instructions that each needs, in Linux' words; the best first."""


def prebuilt_library(folder: Path = FOLDER) -> Path | None:
    """The best library that was built ahead and that this processor can run; None where there is none."""
    has = {*instructions().split()}
    for level, needed in LEVELS.items():
        path = folder / f"{level}.so"
        if needed <= has and path.is_file():
            log.info("kernels built ahead for %s", level)
            return path
    return None


def build_all(folder: Path = FOLDER) -> None:
    """Build every level; nothing on other machines than x86-64.

    Raises:
        RuntimeError: there is no C compiler.
        subprocess.CalledProcessError: it failed.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RuntimeError(f"no C compiler was found: {' or '.join(COMPILERS)}")
    folder.mkdir(exist_ok=True)
    for level in LEVELS:
        build(compiler, folder / f"{level}.so", f"-march={level}")


if __name__ == "__main__":
    build_all()
