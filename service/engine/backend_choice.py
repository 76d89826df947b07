"""Which backend runs a model."""

import importlib.util
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
        if importlib.util.find_spec("triton") is not None:
            from service.engine.cuda.backend import TritonBackend  # where there is no GPU there need be no triton

            return TritonBackend(device)
        log.warning("triton is not installed: attention and adapters run by torch alone, slower")
    if device.type == "cpu" and dtype is torch.float32 and (found := kernels()) is not None:
        return NativeBackend(found)
    return Backend()
