"""What rank costs: the median milliseconds of a step in which so many requests generate, each with an adapter of its own.

One JSON line per number of rows, with the base alone and each rank: where they do not differ, no policy can gain anything.
"""

import argparse
import json
import random
import statistics
import threading

from service.core import AdapterChoice, EngineProtocol, Event, GenerationRequest, SamplingParams, StepReport, TokenEvent
from service.latency.sweep import synthetic_adapters
from service.launch import real_engine
from service.settings import Settings

ROWS = (1, 8, 16, 32)
RANKS = (0, 1, 4, 16, 64)
NEW_TOKENS = 30


class _Recorder:
    def __init__(self) -> None:
        self.steps: list[StepReport] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)

    def on_merge(self, seconds: float) -> None:
        pass


def main() -> None:
    """Measure every number of rows at every rank."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.rank_cost", description=__doc__)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the server")
    options = parser.parse_args()
    recorder = _Recorder()
    engine = real_engine(Settings.load(dict(setting.split("=", 1) for setting in options.set)), recorder)
    engine.start()
    try:
        with synthetic_adapters(engine, count=max(ROWS), rank=max(RANKS), most_bytes=8 << 30) as versions:
            _generate(engine, versions, max(ROWS), max(RANKS))  # so that every adapter is in its place
            for rows in ROWS:
                milliseconds = {}
                for rank in RANKS:
                    recorder.steps.clear()
                    _generate(engine, versions, rows, rank)
                    steps = [each.seconds for each in recorder.steps if each.decode_rows == rows and not each.prefill_tokens]
                    milliseconds[f"rank {rank}" if rank else "base"] = round(1000 * statistics.median(steps), 2)
                print(json.dumps({"rows": rows, **milliseconds}), flush=True)
    finally:
        engine.stop()


def _generate(engine: EngineProtocol, versions: list[str], rows: int, rank: int) -> None:
    rng, ended = random.Random(rows), threading.Semaphore(0)

    def sink(event: Event) -> None:
        if not isinstance(event, TokenEvent):
            ended.release()

    for number in range(rows):
        choice = AdapterChoice(versions[number], rank, 1.0 / rank) if rank else None
        prompt = tuple(rng.randrange(engine.model.vocab_size) for _ in range(24))
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        engine.submit(GenerationRequest(f"{rows}-{rank}-{number}", prompt, sampling, choice), sink)
    for _ in range(rows):
        ended.acquire()


if __name__ == "__main__":
    main()
