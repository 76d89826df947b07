"""The engine's tensors on a GPU."""

import torch

from service.core import AdapterChoice
from service.engine.backend import Backend
from service.engine.cuda.graphs import CudaRecorder, DecodeGraphs, Recorder
from service.engine.cuda.lora_product import TritonProduct
from service.engine.cuda.paged_attention import MOST_PARTS, TritonCache
from service.engine.kv_cache import CacheRoom
from service.engine.model import LoadedModel


class TritonBackend(Backend):
    """Triton's kernels for attention and the adapters' product, and graphs of decode steps."""

    def __init__(self, device: torch.device, recorder: Recorder | None = None, *, parts: int = MOST_PARTS) -> None:
        """`recorder`: None for CUDA's own graphs. `parts`: programs that share the keys of a decode row."""
        self.product: TritonProduct = TritonProduct(device)
        self._device = device
        self._recorder = recorder
        self._parts = parts

    def try_out(self) -> None:
        """Launch a kernel. Raises whatever stands in the way: no C compiler for what Triton builds, an older driver."""
        row = torch.zeros(1, 16, device=self._device)
        owner = AdapterChoice("", 1, 1.0)
        self.product.add(row, row.clone(), row, row, self.product.lay_out([owner], {"": 0}))

    def cache(self, room: CacheRoom) -> TritonCache:
        """Room for keys and values."""
        self._cache = TritonCache(room, parts=self._parts)
        return self._cache

    def graphs(self, loaded: LoadedModel, *, most_rows: int) -> DecodeGraphs:
        """Graphs over the cache made last."""
        blocks = most_rows * -(-loaded.max_context_tokens // self._cache.block_tokens)
        recorder = self._recorder or CudaRecorder()
        return DecodeGraphs(loaded, self._cache, self.product, recorder, most_rows=most_rows, most_blocks=blocks)
