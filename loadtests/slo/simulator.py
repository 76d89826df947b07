"""The experiment without a machine: the real scheduler and the real policy, over steps whose seconds are a formula.

Of a run on a shared machine nobody can tell how much was the policy's doing. Here nothing else happens: what a policy reaches
is what its decisions are worth, where the latency model is right but for noise.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from loadtests.slo.client import Wish, adapter_name
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
from service.engine.fake_engine import FakeEngine
from service.engine.scheduler import Scheduler
from service.engine.scheduler import Sequence as Running
from service.http.auto_rank import AutoRank
from service.http.generation.measurement import Measurement, SequenceMeasurement
from service.http.metrics import Metrics
from service.rank.forecast import Ask, EngineSizes
from service.rank.latency_model import LatencyModel
from service.rank.policies import Policy, PolicyBook, PolicyKind
from service.rank.rank_policy import RankDecision, RankFacts, decide
from service.slo import Slo

SIZES = EngineSizes(max_running=64, max_batch_tokens=512, prefill_chunk_tokens=16)
PROMPT_TOKENS = 40
_BOOK = PolicyBook({"latency": Policy(PolicyKind.LATENCY)}, "latency")
_TOKEN = Token(1, "", 0.0)


def step_s(step: StepReport) -> float:
    """Two cores and a Llama of 100M parameters in fp32, roughly: 32 rows over 32 adapters take 94 ms at rank 4, 123 at 16 and
    241 at 64, the base 84, one row 14.
    """
    seconds = 0.012 + 0.00225 * step.decode_rows + 0.001 * step.prefill_tokens
    return seconds + 2.4e-6 * step.columns * (step.decode_rows + step.prefill_tokens)


class Simulation:
    """One server over simulated time; what it learns stays from one run to the next.

    Args:
        noise: standard deviation of the logarithm of a step's seconds.
    """

    def __init__(self, ranks: Sequence[int], quality: dict[int, float], *, noise: float = 0.08, seed: int = 0) -> None:
        self._facts = RankFacts(tuple(ranks))
        self._quality = quality
        self._noise = noise
        self._rng = random.Random(seed)
        self._now = 0.0
        self._model = LatencyModel()
        for step in _swept(self._rng):
            self._model.on_step(replace(step, seconds=self._seconds(step)))
        self._model.adopt(self._model.statistics())
        self.auto_rank = AutoRank(self._model, FakeEngine(), SIZES, clock=lambda: self._now)
        self._metrics = Metrics()

    def token_ms(self) -> float:
        """Milliseconds of each token of a request alone at rank 1."""
        return 1000 * step_s(StepReport(Mode.MIXED, 0, 1, 1.0, columns=1))

    def play(self, asked: Sequence[Asked], wish: Wish, slack_ms: float) -> list[Outcome]:
        """Every request at its moment; `slack_ms` times the request's slack is its time for each token."""
        scheduler = Scheduler(BlockPool(20_000, 16), **_scheduler_sizes(), prefix_cache=False)
        started, ahead = self._now, list(reversed(asked))
        live: dict[Running, _Live] = {}
        outcomes: dict[Asked, Outcome] = {}
        while ahead or live:
            if not live:
                self._now = max(self._now, started + ahead[-1].at_s)
            while ahead and started + ahead[-1].at_s <= self._now:
                each = ahead.pop()
                one = self._arrive(each, wish, each.deadline.slack * slack_ms * (each.new_tokens + 4), started + each.at_s)
                live[one.running] = one
                scheduler.add(one.running)
            self._step(scheduler, live, outcomes)
        return [outcomes[each] for each in asked]

    def _arrive(self, asked: Asked, wish: Wish, slo_ms: float, at: float) -> "_Live":
        name = adapter_name(asked.adapter)
        ask, slo = Ask(PROMPT_TOKENS, asked.new_tokens, asked.new_tokens), Slo(latency_ms=slo_ms)
        outlook = self.auto_rank.outlook(name, ask, at)
        decision = decide(wish["rank"], None, self._facts, _BOOK, slo=slo, outlook=outlook)  # type: ignore[arg-type]
        measurement = Measurement(
            self.auto_rank,
            self._metrics,
            slo=slo,
            policy=decision.policy,
            rank=decision.rank,
            predicted=decision.predicted,
            in_flight=self.auto_rank.book.view(name, at).in_flight,
            arrived_at=at,
        )
        sampling = SamplingParams(max_new_tokens=asked.new_tokens, ignore_eos=True)
        choice = AdapterChoice(name, decision.rank, 1.0)
        request = GenerationRequest("", (1,) * PROMPT_TOKENS, sampling, choice)
        measured = measurement.sequence(name, ask)
        with measured.in_flight():
            return _Live(Running(request), asked, decision, measurement, measured, slo_ms, at)

    def _step(self, scheduler: Scheduler, live: dict[Running, "_Live"], outcomes: dict[Asked, Outcome]) -> None:
        batch = scheduler.schedule()
        assert batch is not None, "something is live"
        report = batch.report(Mode.MIXED, 1.0)
        report = replace(report, seconds=self._seconds(report))
        self._now += report.seconds
        scheduler.commit(batch)
        for chunk in batch.chunks:
            if not chunk.samples:
                continue
            running, one = chunk.sequence, live[chunk.sequence]
            running.tokens.append(1)
            one.measured.on_event(TokenEvent("", _TOKEN, Mode.MIXED))
            if running.generated == one.asked.new_tokens:
                scheduler.finish(running)
                one.measured.on_event(_finished())
                outcomes[one.asked] = Outcome(
                    one.decision.rank,
                    self._quality[one.decision.rank],
                    1000 * (self._now - one.arrived_at),
                    one.slo_ms,
                    one.measurement.is_met,
                )
                del live[running]
        self._model.on_step(report)

    def _seconds(self, step: StepReport) -> float:
        return step_s(step) * self._rng.lognormvariate(0.0, self._noise)


class _Live:
    """A request in flight."""

    def __init__(
        self,
        running: Running,
        asked: Asked,
        decision: RankDecision,
        measurement: Measurement,
        measured: SequenceMeasurement,
        slo_ms: float,
        arrived_at: float,
    ) -> None:
        self.running = running
        self.asked = asked
        self.decision = decision
        self.measurement = measurement
        self.measured = measured
        self.slo_ms = slo_ms
        self.arrived_at = arrived_at


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
