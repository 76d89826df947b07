"""What choosing ranks costs: microseconds of one decision by the latency policy, and of setting the price after each step,
beside loads of 0 to 64 requests.

One JSON line per load. A decision is everything between a request that is tokenised and its rank, for an adapter with 64 legal
ranks, after every step anew, a third of the requests in flight with objectives of their own. By turns its deadline is one that
every rank meets (`easy`), that some do (`between`) and that none does (`hopeless`); `decision` is of all together. `step` is
what the engine's thread does after each step, the latency model's learning included. Seconds of the processor, not of the
clock: others may use it meanwhile. No server and no model is needed.
"""

import argparse
import itertools
import json
import statistics
import time

from loadtests.slo.simulator import SIZES
from service.core import Mode, StepReport
from service.rank.auto_rank import AutoRank
from service.rank.ladder import TOP
from service.rank.latency_model import LatencyModel
from service.rank.load import InFlight
from service.rank.policies import Policy, PolicyBook, PolicyKind
from service.rank.prospect import Ask
from service.rank.rank_policy import RankFacts, decide
from service.slo import Slo

RANKS = tuple(range(1, 65))
ASK = Ask(40, 60)


def main() -> None:
    """Measure every load."""
    options = _options()
    auto_rank = AutoRank(_model(), SIZES)
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
        step = _step(max(load, 1), 64 * max(load, 1))  # beside nothing the last that was: of one request
        seconds: dict[str, list[float]] = {"easy": [], "between": [], "hopeless": []}
        steps = []
        for number, kind in zip(range(options.decisions), itertools.cycle(seconds)):
            slo = Slo(latency_ms=_deadline_ms(auto_rank, kind, number))
            started = time.thread_time()
            prediction = auto_rank.predict("adapter-0", ASK, time.monotonic())
            decide("auto", None, facts, book, slo=slo, prediction=prediction)
            seconds[kind].append(time.thread_time() - started)
            started = time.thread_time()
            auto_rank.on_step(step)
            steps.append(time.thread_time() - started)
        every = list(itertools.chain(*seconds.values()))
        medians = {f"{kind}_median_us": 1e6 * statistics.median(each) for kind, each in seconds.items()}
        figures = {"in_flight": load, **_quantiles("decision", every), **medians, **_quantiles("step", steps)}
        print(json.dumps({name: round(value, 1) for name, value in figures.items()}), flush=True)


def _deadline_ms(auto_rank: AutoRank, kind: str, number: int) -> float:
    """A deadline of a kind, by what is predicted before the decision that is measured."""
    prediction = auto_rank.predict("adapter-0", ASK, time.monotonic())
    assert prediction is not None, "the model has seen enough"
    low, high = (prediction.at(rank, level).latency_ms for rank, level in ((RANKS[0], TOP), (RANKS[-1], 0)))
    match kind:
        case "easy":
            return 1.5 * high * prediction.safety
        case "hopeless":
            return 0.9 * low
    return (low + (number % 10 + 0.5) / 10 * (high - low)) * prediction.safety


def _quantiles(name: str, seconds: list[float]) -> dict[str, float]:
    seconds.sort()
    return {f"{name}_median_us": 1e6 * statistics.median(seconds), f"{name}_p99_us": 1e6 * seconds[int(0.99 * len(seconds))]}


def _model() -> LatencyModel:
    """One that has seen a machine on which rows and columns take time."""
    model = LatencyModel()
    for number in range(400):
        model.on_step(_step(1 + number % 40, 64 * (number % 30), 16 * (number % 3)))
    return model


def _step(rows: int, columns: int, prompt_tokens: int = 0) -> StepReport:
    """One of that machine."""
    seconds = 0.01 + 0.0005 * rows + columns * (2e-6 + 1.5e-7 * rows)
    return StepReport(Mode.MIXED, prompt_tokens, rows, seconds, columns, 64 * rows, columns // 64, 50 * rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.decision_cost", description=__doc__)
    parser.add_argument("--decisions", type=int, default=2000, help="of each load (default 2000)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
