"""The threads of the server share one heap."""

import ctypes
import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="the C library is not glibc")

_COUNT_HEAPS = """
import ctypes, sys, threading
from service.allocator import share_one_heap

share_one_heap()
all_hold_memory = threading.Barrier(20)
def hold_memory():
    held = [bytearray(5000) for _ in range(100)]
    all_hold_memory.wait()
threads = [threading.Thread(target=hold_memory) for _ in range(20)]
for thread in threads: thread.start()
for thread in threads: thread.join()

libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
stdout = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, stdout)
libc.fflush(stdout)
"""


def heaps(**environment: str) -> int:
    """How many there are once twenty threads have had memory at the same time."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", _COUNT_HEAPS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**inherited, **environment})
    return len(re.findall("<heap nr", done.stdout))


def test_all_threads_share_one_heap() -> None:
    assert heaps() == 1


def test_what_the_environment_says_stays() -> None:
    assert heaps(MALLOC_ARENA_MAX="3") == 3
