"""Which backend runs a model."""

import logging

import torch

from service.core import Compile
from service.engine.backend import Backend, NativeBackend
from service.engine.model import LoadedModel
from service.engine.native.kernels import kernels

log = logging.getLogger(__name__)


def backend_for(loaded: LoadedModel, setting: Compile) -> Backend:
    """The fastest for the model's device and format; torch's own operations where machine code is switched off."""
    device, dtype = loaded.model.device, loaded.model.dtype
    if setting is Compile.OFF:
        return Backend()
    if device.type == "cuda":
        return triton_backend(device)
    if device.type == "cpu" and dtype is torch.float32 and (found := kernels()) is not None:
        return NativeBackend(found)
    return Backend()


def triton_backend(device: torch.device) -> Backend:
    """Triton's kernels if they run here, else torch's own operations, with the reason in the log."""
    try:
        from service.engine.cuda.backend import TritonBackend  # where there is no GPU there need be no triton

        backend = TritonBackend(device)
        backend.try_out()
    except Exception as error:  # whatever an installation lacks: slower is better than not at all
        reason = " ".join(str(error).split()) or type(error).__name__
        log.warning("attention and adapters run by torch alone, slower: Triton's kernels can't run: %s", reason[:300])
        return Backend()
    return backend
