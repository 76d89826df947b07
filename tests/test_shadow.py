"""Shadow scoring: right numbers through a real engine, and no request that waits for it."""

import threading
from collections.abc import Sequence

import pytest

from service.core import AdapterChoice, EngineObserver, EngineStats, GenerationRequest, SamplingParams
from service.http.metrics import Metrics
from service.http.shadow import MAX_WAITING, ShadowScorer, mean_difference
from tests.engine_harness import Client, random_dylora, running_engine
from tests.fake_engine import FakeEngine
from tests.tiny_models import tiny_model

VERSION = "v"
PROMPT = (7, 30, 12)


def choice(rank: int) -> AdapterChoice:
    return AdapterChoice(VERSION, rank, 4.0 / rank)


class Scored(Metrics):
    """Metrics that lets a test wait for a number of scored answers."""

    def __init__(self) -> None:
        super().__init__()
        self.divergences: list[float] = []
        self._changed = threading.Condition()

    def shadow_scored(self, adapter: str, rank: int, divergence: float) -> None:
        super().shadow_scored(adapter, rank, divergence)
        with self._changed:
            self.divergences.append(divergence)
            self._changed.notify_all()

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.divergences) >= count, 60)


def ask(engine: object, scorer: ShadowScorer, served: AdapterChoice | None, tokens: int = 8) -> Client:
    """Send a request as the server does, and wait for its end."""
    client = start(engine, scorer, served, tokens)
    assert client.finished
    return client


def start(engine: object, scorer: ShadowScorer, served: AdapterChoice | None, tokens: int = 8, name: str = "r") -> Client:
    client, followed = Client(), scorer.follow("a" if served else None, PROMPT, served, choice(8) if served else None)

    def sink(event: object) -> None:
        client(event)  # type: ignore[arg-type]
        followed.on_event(event)  # type: ignore[arg-type]

    with followed.in_flight():
        sampling = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        engine.submit(GenerationRequest(name, PROMPT, sampling, served), sink)  # type: ignore[attr-defined]
    return client


def test_the_divergence_is_that_of_the_two_ranks() -> None:
    model, metrics = tiny_model("llama"), Scored()
    with running_engine(model, {VERSION: random_dylora("llama", model, seed=1)}) as engine:
        scorer = ShadowScorer(engine, metrics, share=1.0)
        served = ask(engine, scorer, choice(2))
        metrics.wait(1)
        answer = tuple(served.tokens)
        whole = SamplingParams(max_new_tokens=1, prompt_logprobs=True, ignore_eos=True)
        logprobs = {}
        for rank in (2, 8):
            client = Client()
            engine.submit(GenerationRequest(f"at {rank}", PROMPT + answer, whole, choice(rank)), client)
            logprobs[rank] = [token.logprob or 0.0 for token in client.finished.prompt[len(PROMPT) :]]
        expected = mean_difference(logprobs[2], logprobs[8])
    assert metrics.divergences == pytest.approx([expected], abs=1e-4)
    assert metrics.divergences[0] > 0.01
    value = metrics.registry.get_sample_value("dylora_shadow_divergence", {"adapter": "a", "rank": "2"})
    assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("share", "served"), [(0.0, choice(2)), (1.0, choice(8)), (1.0, None)])
def test_what_is_not_asked_for_is_not_scored(share: float, served: AdapterChoice | None) -> None:
    engine = loaded_fake()
    try:
        ask(engine, ShadowScorer(engine, Metrics(), share), served)
        assert len(engine.submitted) == 1
    finally:
        engine.stop()


def loaded_fake(observer: EngineObserver | None = None) -> FakeEngine:
    engine = FakeEngine(observer)
    model = tiny_model("llama")
    engine.load(VERSION, random_dylora("llama", model, seed=1))
    engine.start()
    return engine


def test_a_request_that_arrives_ends_the_scoring_which_is_tried_again() -> None:
    engine, metrics = loaded_fake(), Scored()
    try:
        scorer = ShadowScorer(engine, metrics, share=1.0)
        first = start(engine, scorer, choice(2), name="first")
        assert first.finished
        metrics.wait(1)
        with engine.paused():
            held = start(engine, scorer, choice(2), tokens=1, name="held")
        assert held.finished  # its scoring may have begun
        with engine.paused():
            disturbing = start(engine, scorer, None, name="disturbing")
            # Paused engines abort all the same: only requests of clients are left.
            assert engine.wait_until(lambda stats: in_flight(stats) == 1)
        assert disturbing.finished
        metrics.wait(2)
    finally:
        engine.stop()


def in_flight(stats: EngineStats) -> int:
    return stats.running + stats.waiting


def test_nothing_is_scored_while_a_request_is_in_flight() -> None:
    engine, metrics = loaded_fake(), Scored()
    try:
        scorer = ShadowScorer(engine, metrics, share=1.0)
        scorer.begin()  # a request that has not ended
        for number in range(MAX_WAITING + 5):
            assert start(engine, scorer, choice(2), tokens=1, name=str(number)).finished
        assert not any(request.request_id.startswith("shadow") for request in engine.submitted)
        scorer.end(None)
        metrics.wait(MAX_WAITING)
        assert sum(request.request_id.startswith("shadow") for request in engine.submitted) == MAX_WAITING
    finally:
        engine.stop()


@pytest.mark.parametrize(("served", "full", "mean"), [([-1.0], [-1.5], 0.5), ([-1.0, -2.0], [-2.0, -1.0], 0.0)])
def test_the_mean_difference(served: Sequence[float], full: Sequence[float], mean: float) -> None:
    assert mean_difference(served, full) == mean
