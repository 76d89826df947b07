"""What is bound by memory: a single row, a merge; and how much of it adapters take."""

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
_CONTEXT_ROWS, _CONTEXTS = (1, 8), (50, 500, 1500)


def large(*shape: int) -> Tensor:
    """Memory as the engine has it for its weights: in large pages where kernels are in use."""
    found = kernels()
    return torch.empty(*shape) if found is None else found.empty(*shape)


def reader() -> Callable[[], float]:
    """A call that reads memory with all threads, and returns bytes per second: of a sum or a matrix by a vector, the better."""
    held = large(_FLOATS).fill_(1.0)
    matrix, vector = held.view(-1, 1024), torch.ones(1024)
    return lambda: held.nbytes / min(_seconds(held.sum), _seconds(lambda: matrix @ vector))


def copier() -> Callable[[], float]:
    """A call that copies with one thread, as a merge runs on one, and returns the bytes per second that it read and wrote."""
    source, target = large(_FLOATS).fill_(1.0), large(_FLOATS).fill_(0.0)

    def copy() -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return 2 * source.nbytes / _seconds(lambda: target.copy_(source))
        finally:
            torch.set_num_threads(threads)

    return copy


def bandwidth_of_one_row(folder: Path, figures: Figures) -> None:
    """Decode alone: every weight is read once for each token. Memory drifts, so its speed is taken before each."""
    read, model = reader(), load_base(folder)
    # The embedding is looked up, not read; tied to the head, it is that which is read.
    nbytes = sum(module.weight.nbytes for module in model.modules() if isinstance(module, torch.nn.Linear))
    ours = OurEngine(model, {})
    bandwidths, seconds = [], []
    for _ in range(_REPEATS):
        bandwidths.append(statistics.median(read() for _ in range(_REPEATS)))
        ours.run("base", 1)
        seconds.append(ours.decode_seconds(Mode.BASE, 1))
    ours.close()
    ratio = statistics.median(nbytes / s / bandwidth for s, bandwidth in zip(seconds[1:], bandwidths[1:], strict=True))
    facts = {"ms_per_token": _ms(seconds), "read_gb_per_s": round(statistics.median(bandwidths) / 1e9, 1)}
    figures.judge("bandwidth of base, batch 1 / read bandwidth", ratio, **facts)


def decode_over_contexts(folder: Path, rounds: int, figures: Figures) -> None:
    """Steps of rows that have seen more: milliseconds, and times those of the shortest context in the same round."""
    ours = OurEngine(load_base(folder), {}, prefill_chunk_tokens=512)  # large: all are to generate before the first ends
    for rows in _CONTEXT_ROWS:
        found: dict[int, list[float]] = {context: [] for context in _CONTEXTS}
        for _ in range(rounds + 1):
            for context, seconds in found.items():
                ours.run("base", rows, prompt_tokens=context)
                seconds.append(ours.decode_seconds(Mode.BASE, rows))
        for context, seconds in found.items():
            times = statistics.median(s / first for s, first in zip(seconds[1:], found[_CONTEXTS[0]][1:], strict=True))
            figures.show(point="contexts", rows=rows, context=context, ms_per_step=_ms(seconds[1:]), times=round(times, 2))
    ours.close()


def bandwidth_of_merging(folder: Path, adapter: Adapter, figures: Figures) -> None:
    """A merge of weights that nobody holds: into the memory of others that were dropped for it, and, as the first merges of a
    server, into fresh memory, which the system has to find and clear. Memory's own speed is taken beside each.
    """
    copy, model = copier(), load_base(folder)
    bank = LoraBank(model, model.get_input_embeddings(), kernels=kernels())
    rank = adapter.config.r_max
    choice = AdapterChoice("one", rank, adapter.config.scale(rank))
    buffer, seconds, ratios = None, [], []
    for _ in range(_REPEATS):
        bandwidth = copy()
        started = time.perf_counter()
        merged = merge(adapter, choice, bank.site, buffer=buffer)
        seconds.append(time.perf_counter() - started)
        buffer = merged.buffer
        ratios.append(2 * merged.nbytes / seconds[-1] / bandwidth)
    figures.judge("bandwidth of a cold merge / copy bandwidth", statistics.median(ratios[1:]), ms=_ms(seconds[1:]))
    figures.judge("bandwidth of a merge into fresh memory / copy bandwidth", ratios[0], ms=_ms(seconds[:1]))


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


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 1)
