"""How the process gets memory from the system: one heap for all threads, where the C library would make one for each.

glibc gives threads heaps of their own, eight for each processor, so that they need not wait for one another. What a thread
frees stays in the heap that it came from. Uploads, exports and tokenizing run in short-lived threads, and each of them leaves
a heap behind whose holes the others can't use: with 64 clients on two cores that was 260 MB after two minutes, and growing,
beside 235 MB in use; with one heap it is 50 MB. Steps run in one thread, and Python's own small objects are not in these
heaps, so there is next to nothing to wait for.
"""

import ctypes
import os

_ARENAS = 1
_M_ARENA_MAX = -8
"""malloc.h of glibc."""
_SET_BY_HAND = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")


def share_one_heap() -> None:
    """Let the threads that start from now on share what heaps there are. Does nothing where the C library is another one, or
    the environment sets it up already.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name in os.environ for name in _SET_BY_HAND):
        mallopt(_M_ARENA_MAX, _ARENAS)
