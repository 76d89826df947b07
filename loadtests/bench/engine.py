"""This project's engine, in this process."""

import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue

import torch
from transformers import PreTrainedModel

from adapters.adapter import Adapter
from adapters.checkpoint import read_peft
from loadtests import workload
from loadtests.bench.contenders import Contender
from service.core import (
    AdapterChoice,
    Compile,
    Event,
    Failed,
    GenerationRequest,
    Mode,
    SamplingParams,
    StepReport,
    TokenEvent,
)
from service.engine.engine import Engine
from service.engine.model import prepare_model
from service.engine.options import EngineOptions

MERGED_BYTES = 2 << 30
"""For several merged copies of the workload's base: where only one fits, modes that take turns merge anew in each."""
WIDE_ADAPTERS, WIDE_RANK = 32, 64
ZIPF_ADAPTERS = 1000


def load_adapters(folder: Path) -> dict[str, Adapter]:
    """The workload's eight adapters."""
    return {f"adapter{i}": read_peft(folder / f"adapter{i}") for i in range(len(workload.RANKS))}


def wide_adapters(model: PreTrainedModel) -> dict[str, Adapter]:
    """32 of rank 64."""
    return {f"wide{i}": workload.random_lora(model, WIDE_RANK, seed=i) for i in range(WIDE_ADAPTERS)}


def many_adapters(ranked: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """1,000: the same numbers under many names, since what differs is whose columns they are."""
    several = list(ranked.values())
    return {f"zipf{i}": several[i % len(several)] for i in range(ZIPF_ADAPTERS)}


class Client:
    """Hears of one request's tokens, and when."""

    def __init__(self, request_id: str, on_end: Callable[[], None] = lambda: None) -> None:
        self.request_id = request_id
        self._on_end = on_end
        self.submitted = time.perf_counter()
        self.moments: list[float] = []
        self._ended = threading.Event()
        self._heard = threading.Semaphore(0)
        self._failure: Failed | None = None

    def __call__(self, event: Event) -> None:
        """The request's sink."""
        if isinstance(event, TokenEvent):
            self.moments.append(time.perf_counter())
        else:
            self._failure = event if isinstance(event, Failed) else None
            self._ended.set()
            self._on_end()
        self._heard.release()

    def wait_for_token(self) -> None:
        """Until the next token that was not waited for, or the end."""
        self._heard.acquire()

    def wait(self) -> None:
        """Until the request ends. Raises RuntimeError if it failed."""
        self._ended.wait()
        if self._failure is not None:
            raise RuntimeError(f"a request failed: {self._failure}")


class OurEngine(Contender):
    """The engine with some adapters loaded. It does not reuse prefixes, as the other engines do not, unless told to."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Mapping[str, Adapter],
        modes: Sequence[str] = ("base",),
        *,
        compile_: Compile = Compile.AUTO,
        prefix_cache: bool = False,
        prefill_chunk_tokens: int = EngineOptions.prefill_chunk_tokens,
    ) -> None:
        is_half = model.dtype is not torch.float32
        self.name = f"dylora, {model.dtype}, compile {compile_}" if is_half else f"dylora, compile {compile_}"
        self.modes = modes
        self._adapters = adapters
        self._steps: list[StepReport] = []
        tokenizer = workload.number_tokenizer(workload.CONFIG["vocab_size"])
        options = EngineOptions(
            prefix_cache=prefix_cache,
            compile=compile_,
            prefill_chunk_tokens=prefill_chunk_tokens,
            merged_cache_bytes=MERGED_BYTES,
        )
        self._engine = Engine(prepare_model(model, tokenizer, name="workload"), options, self)
        for version, adapter in adapters.items():
            self._engine.load(version, adapter)
        self._engine.start()
        self._draws = random.Random(0)
        self._submitted = 0

    def on_step(self, report: StepReport) -> None:
        """The engine's word of each step."""
        self._steps.append(report)

    def on_merge(self, seconds: float) -> None:
        """Not of interest."""

    def submit(
        self,
        prompt: Sequence[int],
        new_tokens: int,
        choice: AdapterChoice | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> Client:
        """Ask for some tokens."""
        self._submitted += 1
        client = Client(f"request-{self._submitted}", on_end)
        sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        self._engine.submit(GenerationRequest(client.request_id, tuple(prompt), sampling, choice), client)
        return client

    def abort(self, client: Client) -> None:
        """End a request."""
        self._engine.abort(client.request_id)
        client.wait()

    def run(
        self,
        mode: str,
        batch: int,
        tokens: int = workload.NEW_TOKENS,
        turns: int = 1,
        *,
        prompt_tokens: int = workload.PROMPT_TOKENS,
    ) -> float:
        """Keep `batch` requests of `tokens` each in flight, `turns` one after another in each row; seconds."""
        ended: SimpleQueue[int] = SimpleQueue()
        choices = [self.choice(self._version(mode, row)) for row in range(batch)]
        prompts = workload.prompts(batch, tokens=prompt_tokens)

        def submit(row: int) -> Client:
            return self.submit(prompts[row], tokens, choices[row], lambda: ended.put(row))

        left = [turns - 1] * batch
        started = time.perf_counter()
        clients = [submit(row) for row in range(batch)]
        for _ in range(turns * batch):
            row = ended.get()
            clients[row].wait()
            if left[row]:
                left[row] -= 1
                clients[row] = submit(row)
        return time.perf_counter() - started

    def decode_seconds(self, mode: Mode, rows: int) -> float:
        """Median of the steps since it was asked last that had just so many generating rows and no prompt."""
        own = [r.seconds for r in self._steps if r.mode is mode and r.decode_rows == rows and not r.prefill_tokens]
        self._steps.clear()
        return statistics.median(own)

    def choice(self, version: str | None, rank: int | None = None) -> AdapterChoice | None:
        """An adapter at a rank, its highest unless given."""
        if version is None:
            return None
        config = self._adapters[version].config
        rank = rank or config.r_max
        return AdapterChoice(version, rank, config.scale(rank))

    @property
    def adapter_bytes(self) -> int:
        """Memory of all columns, used or not."""
        return self._engine.stats().adapter_bytes

    def close(self) -> None:
        """End the engine's thread."""
        self._engine.stop()

    def _version(self, mode: str, row: int) -> str | None:
        if mode == "zipf":
            weights = [1 / (place + 1) for place in range(ZIPF_ADAPTERS)]
            return f"zipf{self._draws.choices(range(ZIPF_ADAPTERS), weights)[0]}"
        mixed, wide = f"adapter{workload.adapter_of(row)}", f"wide{row % WIDE_ADAPTERS}"
        return {"base": None, "merged": "adapter3", "mixed": mixed, "wide": wide}[mode]
