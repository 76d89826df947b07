"""What computes the parts of a step that are ours and not the model's: attention, the adapters' product, whole decode steps."""

from service.engine.kv_cache import CacheRoom, KVCache
from service.engine.mixed import LoraProduct
from service.engine.model import LoadedModel
from service.engine.native.kernels import Kernels
from service.engine.runner import Cache, Graphs


class Backend:
    """torch's own operations, on any device and in any format."""

    kernels: Kernels | None = None
    """Those in C, for float32 on the CPU."""
    product: LoraProduct | None = None
    """The adapters' product of linear modules; None leaves it to torch, or to the kernels in C."""

    def cache(self, room: CacheRoom) -> Cache:
        """Room for keys and values."""
        return KVCache(room, self.kernels)

    def graphs(self, loaded: LoadedModel, *, most_rows: int) -> Graphs | None:
        """Recorded decode steps, of up to so many rows."""
        return None


class NativeBackend(Backend):
    """The kernels in C."""

    def __init__(self, found: Kernels) -> None:
        self.kernels = found
