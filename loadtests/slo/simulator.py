"""The experiment without a machine: the real scheduler and the real policy, over steps whose seconds are a formula.

Of a run on a shared machine nobody can tell how much was the policy's doing. Here nothing happens but what a `Machine` says:
on the steady one the latency model is right but for noise, on the shared one all gets slower for seconds at a time.
"""

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from adapters.quality import Metric, QualityProfile
from loadtests.slo.client import Wish, adapter_name
from loadtests.slo.plan import KEPT
from loadtests.slo.results import Outcome
from loadtests.slo.trace import Asked
from service.core import (
    AdapterChoice,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Mode,
    SamplingParams,
    StepReport,
    Token,
    TokenEvent,
    Usage,
)
from service.engine.blocks import BlockPool
from service.engine.options import EngineOptions
from service.engine.scheduler import Scheduler
from service.engine.scheduler import Sequence as Running
from service.http.generation.measurement import Measurement, SequenceMeasurement
from service.http.metrics import Metrics
from service.rank.auto_rank import AutoRank
from service.rank.latency_model import LatencyModel
from service.rank.policies import Policy, PolicyBook, PolicyKind
from service.rank.prospect import Ask, EngineSizes
from service.rank.rank_policy import RankDecision, RankFacts, decide
from service.rank.safety import SafetyFactor
from service.slo import Slo

SIZES = EngineSizes(max_running=64, max_batch_tokens=512, prefill_chunk_tokens=EngineOptions.prefill_chunk_tokens)
PROMPT_TOKENS = 40
BOOK = PolicyBook({"latency": Policy(PolicyKind.LATENCY), KEPT: Policy(PolicyKind.LATENCY, elastic=False)}, "latency")
_TOKEN = Token(1, "", 0.0)


def step_s(step: StepReport) -> float:
    """Two cores and a Llama of 24M parameters in fp32, roughly as measured: 32 rows over 32 adapters take 39 ms at rank 4, 48
    at 16 and 85 at 64, the base 25, one row 14.
    """
    rows = step.decode_rows + step.prefill_tokens
    seconds = 0.013 + 0.0004 * step.decode_rows + 0.0007 * step.prefill_tokens
    return seconds + 0.0003 * min(step.adapters, rows) + 18e-6 * step.columns + 6e-6 * step.row_ranks


@dataclass(frozen=True)
class Machine:
    """How far a step's seconds are from the formula.

    Attributes:
        noise: standard deviation of their logarithm.
        straggling: share of the steps that take STRAGGLER times as long, each alone.
        slow: how many times as long all takes in a slow spell.
        slow_s, fast_s: mean seconds of a slow spell, and of the time between two.
    """

    noise: float = 0.08
    straggling: float = 0.0
    slow: float = 1.0
    slow_s: float = 2.0
    fast_s: float = 8.0


STEADY = Machine()
"""What a policy's decisions are worth: nothing else happens."""
SHARED = Machine(noise=0.15, straggling=0.01, slow=1.6, fast_s=10.0)
"""As the machines were that it ran on over HTTP: others take memory's bandwidth for seconds, the processor for moments."""
MACHINES = {"steady": STEADY, "shared": SHARED}
STRAGGLER = 3.0
"""How many times as long a step takes that waits for others' work."""


class Simulation:
    """One server over simulated time; what it learns stays from one run to the next."""

    def __init__(self, ranks: Sequence[int], quality: dict[int, float], *, machine: Machine = STEADY, seed: int = 0) -> None:
        profile = QualityProfile((Metric("claimed", higher_is_better=True, values=quality),), "claimed")
        self._facts = RankFacts(tuple(ranks), profile)
        self._quality = quality
        self._machine = machine
        self._rng = random.Random(seed)
        self.now = 0.0
        model = LatencyModel()
        for step in _swept(self._rng):
            model.on_step(replace(step, seconds=step_s(step) * self._rng.lognormvariate(0.0, machine.noise)))
        model.adopt(model.statistics())
        self.auto_rank = AutoRank(model, SIZES, SafetyFactor(), clock=lambda: self.now)
        self._metrics = Metrics()

    def token_ms(self) -> float:
        """Milliseconds of each token of a request alone at rank 1."""
        return 1000 * step_s(StepReport(Mode.MIXED, 0, 1, 1.0, columns=1, row_ranks=1, adapters=1))

    def play(self, asked: Sequence[Asked], wish: Wish, slack_ms: float) -> list[Outcome]:
        """Every request at its moment; `slack_ms` times the request's slack is its time for each token."""
        scheduler = Scheduler(BlockPool(20_000, 16), **_scheduler_sizes(), prefix_cache=False)
        started, ahead = self.now, list(reversed(asked))
        spells = _Spells(self._machine, len(asked), started)  # the same for every policy
        live: dict[Running, _Live] = {}
        outcomes: dict[Asked, Outcome] = {}
        while ahead or live:
            if not live:
                self.now = max(self.now, started + ahead[-1].at_s)
            while ahead and started + ahead[-1].at_s <= self.now:
                each = ahead.pop()
                one = self._arrive(each, wish, each.deadline.slack * slack_ms * (each.new_tokens + 4), started + each.at_s)
                live[one.running] = one
                scheduler.add(one.running)
            self._step(scheduler, spells, live, outcomes)
        return [outcomes[each] for each in asked]

    def _arrive(self, asked: Asked, wish: Wish, slo_ms: float, at: float) -> "_Live":
        name = adapter_name(asked.adapter)
        ask, slo = Ask(PROMPT_TOKENS, asked.new_tokens, asked.new_tokens), Slo(latency_ms=slo_ms)
        prediction = self.auto_rank.predict(name, ask, at)
        rank, policy = wish["rank"], wish.get("rank_policy")
        decision = decide(rank, policy, self._facts, BOOK, slo=slo, prediction=prediction)  # type: ignore[arg-type]
        measurement = Measurement(
            self.auto_rank, self._metrics, slo=slo, decision=decision, predicted=decision.predicted, arrived_at=at
        )
        sampling = SamplingParams(max_new_tokens=asked.new_tokens, ignore_eos=True)
        request = GenerationRequest("", (1,) * PROMPT_TOKENS, sampling, AdapterChoice(name, decision.rank, 1.0))
        running = Running(request)
        measured = measurement.sequence(name, ask, lambda rank: running.change_rank(AdapterChoice(name, rank, 1.0)))
        with measured.in_flight():
            return _Live(running, asked, decision, measurement, measured, slo_ms, at)

    def _step(
        self, scheduler: Scheduler, spells: "_Spells", live: dict[Running, "_Live"], outcomes: dict[Asked, Outcome]
    ) -> None:
        batch = scheduler.schedule()
        assert batch is not None, "something is live"
        report = batch.report(Mode.MIXED, 1.0)
        report = replace(report, seconds=self._seconds(report) * spells.slowdown(self.now))
        self.now += report.seconds
        scheduler.commit(batch)
        for chunk in batch.chunks:
            if not chunk.samples:
                continue
            running, one = chunk.sequence, live[chunk.sequence]
            running.tokens.append(1)
            assert running.choice is not None
            one.ranks.append(running.choice.rank)
            one.measured.on_event(TokenEvent("", _TOKEN, Mode.MIXED, rank=running.choice.rank))
            if running.generated == one.asked.new_tokens:
                scheduler.finish(running)
                one.measured.on_event(_finished())
                outcomes[one.asked] = Outcome(
                    one.decision.rank,
                    statistics.fmean(self._quality[rank] for rank in one.ranks),
                    1000 * (self.now - one.arrived_at),
                    one.slo_ms,
                    one.measurement.is_met,
                    one.asked.at_s,
                    changes=len(one.measurement.segments) - 1,
                )
                del live[running]
        self.auto_rank.on_step(report)

    def _seconds(self, step: StepReport) -> float:
        seconds = step_s(step) * self._rng.lognormvariate(0.0, self._machine.noise)
        return seconds * (STRAGGLER if self._rng.random() < self._machine.straggling else 1.0)


class _Spells:
    """When a machine is slow, from `start` on, when it is not."""

    def __init__(self, machine: Machine, seed: int, start: float) -> None:
        self._machine = machine
        self._rng = random.Random(seed)
        self._is_slow = False
        self._turns_at = start + self._rng.expovariate(1 / machine.fast_s)

    def slowdown(self, now: float) -> float:
        """How many times as long a step takes that begins now, which is no earlier than it was asked for before."""
        machine = self._machine
        while now >= self._turns_at:
            self._is_slow = not self._is_slow
            self._turns_at += self._rng.expovariate(1 / (machine.slow_s if self._is_slow else machine.fast_s))
        return machine.slow if self._is_slow else 1.0


@dataclass(eq=False)
class _Live:
    """A request in flight."""

    running: Running
    asked: Asked
    decision: RankDecision
    measurement: Measurement
    measured: SequenceMeasurement
    slo_ms: float
    arrived_at: float
    ranks: list[int] = field(default_factory=list)


def _finished() -> Event:
    return Finished("", FinishReason.LENGTH, "", Mode.MIXED, Usage(0, 0, 0.0, 0.0, 0.0))


def _scheduler_sizes() -> dict[str, int]:
    return {
        "max_running": SIZES.max_running,
        "max_batch_tokens": SIZES.max_batch_tokens,
        "prefill_chunk_tokens": SIZES.prefill_chunk_tokens,
    }


def _swept(rng: random.Random) -> Iterator[StepReport]:
    """Steps as a sweep at start-up makes them."""
    for _ in range(200):
        decode = rng.choice([0, 1, 2, 4, 8, 16, 32, 64])
        prefill = rng.choice([0, 0, 0, 16, 48]) if decode else rng.randrange(8, 256)
        adapters, rank = rng.randrange(1, 9), rng.choice([1, 4, 16, 64])
        rows = decode + prefill
        yield StepReport(Mode.MIXED, prefill, decode, 1.0, adapters * rank, rows * rank, adapters, 60 * decode + prefill)
