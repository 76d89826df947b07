"""What is bound by memory: a single row, a merge; and how much of it adapters take."""

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from adapters.adapter import Adapter
from adapters.config import AdapterConfig, AdapterKind
from loadtests import workload
from loadtests.bench.engine import OurEngine
from loadtests.bench.figures import Figures
from loadtests.workload import load_base
from service.core import AdapterChoice, Mode
from service.engine.lora import LoraBank
from service.engine.merged import merge
from service.engine.native.kernels import kernels

_FLOATS = 100 << 20
_REPEATS = 9


def large(*shape: int) -> Tensor:
    """Memory as the engine has it for its weights: in large pages where kernels are in use."""
    found = kernels()
    return torch.empty(*shape) if found is None else found.empty(*shape)


def read_bandwidth() -> float:
    """Bytes per second at which all threads read memory: the better of a sum and a product with a vector."""
    held = large(_FLOATS).fill_(1.0)
    matrix, vector = held.view(-1, 1024), torch.ones(1024)
    return held.nbytes / min(_fastest(held.sum), _fastest(lambda: matrix @ vector))


def copy_bandwidth() -> float:
    """Bytes per second, read and written, at which one thread copies, as a merge runs on one."""
    source, target = large(_FLOATS).fill_(1.0), large(_FLOATS).fill_(0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return 2 * source.nbytes / _fastest(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(threads)


def bandwidth_of_one_row(folder: Path, figures: Figures) -> None:
    """Decode alone: every weight is read once for each token."""
    bandwidth = read_bandwidth()
    model = load_base(folder)
    # The embedding is looked up, not read; tied to the head, it is that which is read.
    nbytes = sum(module.weight.nbytes for module in model.modules() if isinstance(module, torch.nn.Linear))
    ours = OurEngine(model, {})
    for _ in range(4):
        ours.run("base", 1)
    seconds = ours.decode_seconds(Mode.BASE, 1)
    ours.close()
    ratio = nbytes / seconds / bandwidth
    facts = {"ms_per_token": round(seconds * 1e3, 2), "read_gb_per_s": round(bandwidth / 1e9, 1)}
    figures.judge("bandwidth of base, batch 1 / read bandwidth", ratio, **facts)


def bandwidth_of_merging(folder: Path, adapter: Adapter, figures: Figures) -> None:
    """A merge of weights that nobody holds: into the memory of others that were dropped for it, and, as the first merges of a
    server, into fresh memory, which the system has to find and clear.
    """
    model = load_base(folder)
    bank = LoraBank(model, model.get_input_embeddings(), kernels=kernels())
    rank = adapter.config.r_max
    choice = AdapterChoice("one", rank, adapter.config.scale(rank))
    buffer, seconds = None, []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        merged = merge(adapter, choice, bank.site, buffer=buffer)
        seconds.append(time.perf_counter() - started)
        buffer = merged.buffer
    bandwidth = copy_bandwidth()
    nbytes = 2 * merged.nbytes
    facts = {"copy_gb_per_s": round(bandwidth / 1e9, 1), "ms": round(statistics.median(seconds[1:]) * 1e3, 1)}
    figures.judge("bandwidth of a cold merge / copy bandwidth", nbytes / statistics.median(seconds[1:]) / bandwidth, **facts)
    fresh = nbytes / seconds[0] / bandwidth
    figures.judge("bandwidth of a merge into fresh memory / copy bandwidth", fresh, ms=round(seconds[0] * 1e3, 1))


def memory_of_ranks(folder: Path, adapter: Adapter, figures: Figures) -> None:
    """One copy of an adapter serves every rank: memory beside the number of ranks in use at one time."""
    nested = Adapter(AdapterConfig(AdapterKind.DYLORA, adapter.config.r_max, workload.ALPHA), adapter.modules)
    ours = OurEngine(load_base(folder), {"nested": nested})
    ranks = nested.config.ranks
    found: dict[int, int] = {}
    for count in (1, len(ranks) // 2, len(ranks)):
        clients = [ours.submit([5, 6, 7], 4, ours.choice("nested", rank)) for rank in ranks[:count]]
        for client in clients:
            client.wait()
        found[count] = ours.adapter_bytes
        figures.show(ranks_in_use=count, adapter_mb=round(found[count] / 2**20, 1))
    ours.close()
    figures.judge("adapter memory at all ranks / at one", found[len(ranks)] / found[1])


def _fastest(call: Callable[[], object]) -> float:
    """Seconds."""
    gc.collect()
    found = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)
