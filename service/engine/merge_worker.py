"""Merging beside the engine: weights are computed by a thread of their own, and no step waits for them."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.adapter import Adapter
from service.core import AdapterChoice
from service.engine.merged import MergeCancelled, MergedWeights, merge
from service.engine.sites import Site

log = logging.getLogger(__name__)

_NICENESS = 10
"""Of a merge's thread beside the engine's: a tenth of a processor that both want."""


@dataclass(frozen=True)
class MergeResult:
    """What became of a merge; no weights if it failed or was cancelled."""

    choice: AdapterChoice
    weights: MergedWeights | None
    seconds: float


class MergeWorker:
    """Makes merged weights, one pair at a time.

    A thread per merge: its products run outside the interpreter's lock, slice by slice (see `merged`), so that the engine's
    thread gets both the lock and the processor back soon, and where the system allows it at a lower priority: the threads of a
    step wait for each other, so that one which has to share its processor would make all of them late.
    """

    def __init__(self, site_of: Callable[[str], Site], on_end: Callable[[MergeResult], None]) -> None:
        """`on_end` is called from the worker's thread, once for each merge."""
        self._site_of = site_of
        self._on_end = on_end
        self._thread: threading.Thread | None = None
        self._is_cancelled = threading.Event()

    def start(self, adapter: Adapter, choice: AdapterChoice, buffer: Tensor | None) -> None:
        """Begin a merge, into `buffer` if it fits. Call it again only after `on_end`."""
        self._thread = threading.Thread(target=self._run, args=(adapter, choice, buffer), name="merge", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give up the merge that runs, if any, and wait for the thread to end."""
        self._is_cancelled.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, adapter: Adapter, choice: AdapterChoice, buffer: Tensor | None) -> None:
        started = time.monotonic()
        weights = None
        _step_back()
        try:
            weights = self._merge(adapter, choice, buffer)
        except MergeCancelled:
            pass
        except Exception:  # for want of memory, say: the requests do without
            log.exception("merging %s at rank %d failed; its requests run mixed", choice.version, choice.rank)
        self._on_end(MergeResult(choice, weights, time.monotonic() - started))

    def _merge(self, adapter: Adapter, choice: AdapterChoice, buffer: Tensor | None) -> MergedWeights:
        weights = merge(adapter, choice, self._site_of, buffer=buffer, is_cancelled=self._is_cancelled.is_set)
        if weights.buffer.is_cuda:
            # Complete when it is told of, and its time is that of the work. Not the whole device: while a graph is recorded
            # on another of its streams, that is an error.
            torch.cuda.current_stream(weights.buffer.device).synchronize()
        return weights


def _step_back() -> None:
    """Lower the priority of the calling thread, which only Linux has one for."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)
