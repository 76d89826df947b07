"""Building the kernels with the machine's C compiler, once for each processor and source."""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import platformdirs

log = logging.getLogger(__name__)

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.c")))
_HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-lm")
COMPILERS = ("cc", "gcc")
_TIMEOUT_S = 120


def built_libraries() -> Iterator[Path]:
    """The library, from the user's cache or built now, and for whom that one is of no use the same in another folder.

    None, with the reason in the log, where it can't be built.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        log.info("no C compiler (%s) was found, to build kernels with", " or ".join(COMPILERS))
        return
    name = f"kernels-{_fingerprint(compiler)}.so"
    started = time.monotonic()
    for folder in _folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.getuid():  # somebody else's code must not run as ours
                continue
            built = folder / name
            if not built.exists():
                build(compiler, built)
                log.info("kernels built for this processor in %.1f s: %s", time.monotonic() - started, built)
        except OSError:  # a folder that can't be written to: the next one
            continue
        except subprocess.SubprocessError as error:
            reason = getattr(error, "stderr", None) or str(error)
            log.warning("the kernels could not be built: products run by torch alone, slower: %s", reason.strip()[:500])
            return
        yield built


def _folders() -> tuple[Path, Path]:
    """Where libraries are kept, best first."""
    cache = platformdirs.user_cache_path("dylora", appauthor=False)
    return cache, Path(tempfile.gettempdir()) / f"dylora-{os.getuid()}"


def build(compiler: str, built: Path, *more_flags: str) -> None:
    """Compile beside the target and rename, so that two processes that build at once both find a whole file."""
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        fresh = Path(folder) / built.name
        command = [compiler, *map(str, SOURCES), "-o", str(fresh), *_FLAGS, *more_flags]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
        fresh.replace(built)


def _fingerprint(compiler: str) -> str:
    """Of all that the machine code follows from: the sources, how it is compiled, and the processor's instructions."""
    sources = [path.read_bytes() for path in (*SOURCES, *_HEADERS)]
    parts = [*sources, compiler.encode(), " ".join(_FLAGS).encode(), platform.machine().encode(), instructions()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def instructions() -> bytes:
    """Names of the processor's instruction sets, as Linux tells them; elsewhere its name."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:  # not Linux
        return platform.processor().encode()
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
