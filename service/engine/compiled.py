"""torch.compile for the blocks of a model, with as few graphs as can be.

Only one block is compiled, and every other runs its code, since all their weights are inputs. What a step decides is hidden
from the compiler behind two operators: attention, and every module that adapters can change. So base, merged and mixed
steps, any adapters, ranks, contexts and numbers of rows from 2 on share one graph; a single row, which the compiler sees as a
case of its own, has another. What is compiled is all between those operators: norms, rotary embeddings, activations, sums.
"""

import logging
import os
import shutil
import time
from typing import Any

from torch import nn
from torch.fx.experimental import _config

from service.core import Compile
from service.engine.model import LoadedModel

log = logging.getLogger(__name__)

GRAPHS_PER_KIND = 2
"""Of each kind of block: one for a single row, one for several."""
_WORTH_IT_PARAMETERS = 50_000_000
"""Below, eager steps take so few milliseconds that a start without half a minute of compilation is worth more."""

_shapes: Any = _config  # which gets its `patch` when it is imported
_OPTIONS = {"size_asserts": False}  # checks of every buffer in Python: a millisecond of a step


def wants_compilation(setting: Compile, loaded: LoadedModel) -> bool:
    """Whether the blocks are to be compiled."""
    if setting is not Compile.AUTO:
        return setting is Compile.ON
    is_large = loaded.model.device.type == "cpu" and loaded.facts.parameters >= _WORTH_IT_PARAMETERS
    return is_large and shutil.which(os.environ.get("CXX", "g++")) is not None


def blocks_of(loaded: LoadedModel) -> dict[str, nn.Module]:
    """The repeated modules that hold the attention layers, by path; empty if the model has no list of them."""
    found = {}
    for path, module in loaded.model.named_modules():
        if module not in loaded.layers:
            continue
        parts = path.split(".")
        for depth in range(len(parts) - 1, 0, -1):
            if isinstance(loaded.model.get_submodule(".".join(parts[: depth - 1])), nn.ModuleList):
                block = ".".join(parts[:depth])
                found[block] = loaded.model.get_submodule(block)
                break
        else:
            return {}
    return found


class CompiledBlocks:
    """Compiles a model's blocks at their first call inside the `with` block, and leaves them as they were if that fails."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._name = type(loaded.model).__name__
        self._blocks = blocks_of(loaded)
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.monotonic()
        if not self._blocks:
            log.info("%s has no list of blocks: it runs without compilation", self._name)
        else:
            log.info("compiling %s, whose %d blocks share their graphs", self._name, len(self._blocks))
        # Else sizes that are equal when a graph is made are taken to be so always: rows and a head's dimensions, by chance.
        self._patch = _shapes.patch(use_duck_shape=False)
        self._patch.__enter__()
        for block in self._blocks.values():
            block.compile(dynamic=True, fullgraph=True, options=_OPTIONS)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self._patch.__exit__(None, None, None)
        if error is None:
            if self._blocks:
                log.info("compiled in %.1f s", time.monotonic() - self._started)
            return False
        for block in self._blocks.values():
            block._compiled_call_impl = None
        reason = " ".join(str(error).split()) or type(error).__name__
        log.warning("%s can't be compiled and runs without: %s", self._name, reason[:300])
        return isinstance(error, Exception)
