"""How well the latency model predicts steps: swept as at start-up, then judged on traffic that it was not fitted on.

One JSON line for each of: the sweep; the model as the sweep left it (`frozen`); the model as it serves, corrected by the
steps before each (`online`). Errors are |predicted / measured - 1| of single steps.
"""

import argparse
import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

from service.core import AdapterChoice, EngineProtocol, Event, GenerationRequest, SamplingParams, StepReport, TokenEvent
from service.latency.sweep import MAX_ADAPTERS, RANKS, sweep, synthetic_adapters
from service.launch import real_engine
from service.rank.latency_model import LatencyModel
from service.settings import Settings


class _Recorder:
    """Keeps each step with what was predicted of it before it was learned from."""

    def __init__(self, model: LatencyModel) -> None:
        self._model = model
        self.steps: list[tuple[StepReport, float | None]] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append((report, self._model.seconds(report)))
        self._model.on_step(report)

    def on_merge(self, seconds: float) -> None:
        pass


def main() -> None:
    """Sweep, then serve random requests and compare."""
    options = _options()
    settings = Settings.load(dict(setting.split("=", 1) for setting in options.set))
    model = LatencyModel()
    recorder = _Recorder(model)
    engine = real_engine(settings, recorder)
    engine.start()
    try:
        started = time.monotonic()
        waves = sweep(engine, max_running=settings.max_running_requests, seconds=options.sweep_s)
        took = time.monotonic() - started
        model.adopt(model.statistics())
        frozen = LatencyModel(model.statistics())
        _show("sweep", seconds=round(took, 2), waves=waves, steps=len(recorder.steps))
        recorder.steps.clear()
        with synthetic_adapters(engine, count=options.adapters, rank=RANKS[0]) as versions:
            _serve(engine, versions, options)
        steps = list(recorder.steps)
    finally:
        engine.stop()
    _report("frozen", [(step, frozen.seconds(step)) for step, _ in steps])
    _report("online", steps)


def _serve(engine: EngineProtocol, versions: list[str], options: argparse.Namespace) -> None:
    """Poisson arrivals of requests over the base and all adapters, at any rank."""
    rng = random.Random(options.seed)
    ended = threading.Semaphore(0)

    def sink(event: Event) -> None:
        if not isinstance(event, TokenEvent):
            ended.release()

    for number in range(options.requests):
        version = rng.choice([None, *versions])
        rank = rng.choice(RANKS)
        choice = None if version is None else AdapterChoice(version, rank, 1.0 / rank)
        prompt = tuple(rng.randrange(engine.model.vocab_size) for _ in range(rng.randrange(4, 120)))
        sampling = SamplingParams(max_new_tokens=rng.randrange(4, 60), ignore_eos=True)
        engine.submit(GenerationRequest(f"measured-{number}", prompt, sampling, choice), sink)
        time.sleep(rng.expovariate(options.rate))
    for _ in range(options.requests):
        ended.acquire()


def _report(name: str, steps: list[tuple[StepReport, float | None]]) -> None:
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for step, predicted in steps:
        if predicted is not None:
            error = abs(predicted / step.cycle_s - 1)
            groups["all"].append(error)
            groups[step.mode + (" with prompt tokens" if step.prefill_tokens else "")].append(error)
    for group, errors in groups.items():
        errors.sort()
        _show(name, steps=group, count=len(errors), **dict(_quantiles(errors)))


def _quantiles(errors: list[float]) -> Iterator[tuple[str, float]]:
    yield "median", round(errors[len(errors) // 2], 4)
    yield "p95", round(errors[int(0.95 * (len(errors) - 1))], 4)


def _show(point: str, **figures: object) -> None:
    print(json.dumps({"point": point, **figures}), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.latency_error", description=__doc__)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the server")
    parser.add_argument("--sweep-s", type=float, default=10, help="longest sweep (default 10)")
    parser.add_argument("--requests", type=int, default=200, help="served after it (default 200)")
    parser.add_argument("--rate", type=float, default=30, help="their arrivals per second (default 30)")
    parser.add_argument("--adapters", type=int, default=MAX_ADAPTERS, help=f"made up for them (default {MAX_ADAPTERS})")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
