"""What choosing ranks costs: microseconds of one decision by the latency policy, and of setting the price after each step,
beside loads of 0 to 64 requests.

One JSON line per load. `decision` is everything between a request that is tokenised and its rank, for an adapter with 64 legal
ranks, after every step anew, a third of the requests in flight with objectives of their own; `step` is what the engine's thread
does after each step, the latency model's learning included. Seconds of the processor, not of the clock: others may use it
meanwhile. No server and no model is needed.
"""

import argparse
import json
import statistics
import time

from service.core import Mode, StepReport
from service.rank.auto_rank import AutoRank
from service.rank.latency_model import LatencyModel
from service.rank.load import InFlight
from service.rank.policies import Policy, PolicyBook, PolicyKind
from service.rank.prospect import Ask, EngineSizes
from service.rank.rank_policy import RankFacts, decide
from service.slo import Slo

RANKS = tuple(range(1, 65))


def main() -> None:
    """Measure every load."""
    options = _options()
    auto_rank = AutoRank(_model(), EngineSizes(64, 512, 6))
    book = PolicyBook({"latency": Policy(PolicyKind.LATENCY)}, "latency")
    facts = RankFacts(RANKS)
    ladder = facts.ladder(RANKS[0], RANKS[-1])
    in_flight = 0
    for load in (0, 8, 32, 64):
        while in_flight < load:
            due_at = time.monotonic() + 1e6 if in_flight % 3 == 0 else None
            request = InFlight(f"adapter-{in_flight % 32}", ladder, ladder[0], 40, 60, due_at)
            auto_rank.book.add(request, time.monotonic())
            auto_rank.book.token(request)
            in_flight += 1
        step = StepReport(Mode.MIXED, 0, load, 0.05, 64 * load, 64 * load, load, 70 * load)
        seconds, steps = [], []
        for number in range(options.decisions):
            slo = Slo(latency_ms=1000 + 5 * (number % 400))
            started = time.thread_time()
            prediction = auto_rank.predict("adapter-0", Ask(40, 60), time.monotonic())
            decide("auto", None, facts, book, slo=slo, prediction=prediction)
            seconds.append(time.thread_time() - started)
            started = time.thread_time()
            auto_rank.on_step(step)
            steps.append(time.thread_time() - started)
        figures = {"in_flight": load, **_quantiles("decision", seconds), **_quantiles("step", steps)}
        print(json.dumps({name: round(value, 1) for name, value in figures.items()}), flush=True)


def _quantiles(name: str, seconds: list[float]) -> dict[str, float]:
    seconds.sort()
    return {f"{name}_median_us": 1e6 * statistics.median(seconds), f"{name}_p99_us": 1e6 * seconds[int(0.99 * len(seconds))]}


def _model() -> LatencyModel:
    """One that has seen a machine on which rows and columns take time."""
    model = LatencyModel()
    for number in range(400):
        rows, columns = 1 + number % 40, 64 * (number % 30)
        seconds = 0.01 + 0.0005 * rows + columns * (2e-6 + 1.5e-7 * rows)
        model.on_step(StepReport(Mode.MIXED, 16 * (number % 3), rows, seconds, columns, 64 * rows, number % 30, 50 * rows))
    return model


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.decision_cost", description=__doc__)
    parser.add_argument("--decisions", type=int, default=2000, help="of each load (default 2000)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
