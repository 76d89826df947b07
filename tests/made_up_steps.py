"""Steps of a machine that there is not, whose seconds are known exactly: the latency model without clock or engine."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

from service.core import Mode, StepReport
from service.rank.latency_model import LatencyModel, Statistics


def true_seconds(step: StepReport) -> float:
    """A machine that waits for its weights up to eight rows, and multiplies after them."""
    rows = step.decode_rows + step.prefill_tokens
    seconds = 0.012 + 0.0005 * max(rows, 8) + 2e-7 * step.context_tokens + 0.002 * (step.prefill_tokens > 0)
    if step.mode is Mode.MIXED:
        seconds += 0.003 + step.columns * (2e-6 + 1.5e-7 * rows)
    return seconds


def some_steps(seed: int, count: int, noise: float = 0.0) -> Iterator[StepReport]:
    rng = random.Random(seed)
    for _ in range(count):
        mode = rng.choice([Mode.BASE, Mode.MIXED, Mode.MIXED])
        decode = rng.choice([0, 1, 2, 4, 8, 16, 32])
        prefill = rng.choice([0, 0, 0, 16, 48]) if decode else rng.randrange(8, 256)
        adapters = rng.randrange(1, 9) if mode is Mode.MIXED else 0
        rank = rng.choice([1, 4, 16, 64])
        work = StepReport(
            mode, prefill, decode, 1.0, adapters * rank, (decode + prefill) * rank, adapters, 40 * decode + 2 * prefill
        )
        yield replace(work, seconds=true_seconds(work) * rng.lognormvariate(0, noise))


def trained(steps: Iterable[StepReport]) -> LatencyModel:
    model = LatencyModel()
    for step in steps:
        model.on_step(step)
    return model


@lru_cache(maxsize=1)
def known_statistics() -> dict[Mode, Statistics]:
    """Of a model that knows the machine."""
    return trained(some_steps(0, 400)).statistics()


def known_model() -> LatencyModel:
    """A model that knows the machine: a decode step takes 16 ms alone, 64 columns add 0.2 ms alone and 0.7 ms beside 31."""
    return LatencyModel(known_statistics())
