"""Latency objectives over HTTP, around an engine without a model and a latency model of a machine that is known."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.core import Aborted, Failed, Finished, FinishReason, Mode, StepReport, Token, TokenEvent, Usage
from service.errors import EngineFailed
from service.http.generation.measurement import Measurement
from service.http.generation.selection import SLO_HEADERS
from service.rank.load import LoadBook
from service.rank.prospect import Ask
from service.rank.rank_policy import RankDecision, RankReason
from service.slo import Slo
from tests.fake_engine import FakeEngine
from tests.http_harness import PROFILE, Server, adapter, in_process
from tests.http_keys import make_key, write_keys
from tests.made_up_steps import known_statistics

LOOSE_MS = 1e6


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """`demo` has a measured profile, best at rank 4; `plain` has none."""
    stored = {"demo": adapter(), "plain": adapter(seed=1, quality=None)}
    with in_process(tmp_path, stored=stored) as server:
        server.services.auto_rank.model.adopt(known_statistics())
        yield server


def test_the_answer_says_rank_reason_prediction_and_verdict(server: Server) -> None:
    response = server.generate(adapter_id="demo", latency_slo_ms=LOOSE_MS, details=True)
    assert response.status_code == 200
    assert (response.headers["x-lora-rank"], response.headers["x-lora-rank-reason"]) == ("4", "slo")
    assert response.headers["x-slo-met"] == "true"
    details = response.json()["details"]
    assert details["slo"] == {"latency_slo_ms": LOOSE_MS, "ttft_slo_ms": None, "itl_slo_ms": None, "met": True}
    assert (details["rank"], details["rank_reason"], details["rank_policy"]) == (4, "slo", "latency")
    assert details["predicted"]["latency_ms"] > details["predicted"]["ttft_ms"] > details["predicted"]["itl_ms"] > 0
    assert float(response.headers["x-predicted-latency-ms"]) == pytest.approx(details["predicted"]["latency_ms"], abs=0.1)


@pytest.mark.parametrize("header", ["X-Latency-SLO-Ms", "X-TTFT-SLO-Ms", "X-ITL-SLO-Ms"])
def test_headers_stand_in_for_the_body(server: Server, header: str) -> None:
    assert header.lower() in SLO_HEADERS
    response = server.generate(adapter_id="demo", headers={header: "99999.5"})
    assert (response.headers["x-lora-rank-reason"], response.headers["x-slo-met"]) == ("slo", "true")
    impossible = server.generate(adapter_id="demo", headers={header: "0.01"})
    assert impossible.json()["error_type"] == "slo_unattainable"
    body_first = server.generate(adapter_id="demo", itl_slo_ms=LOOSE_MS, headers={header: "0.01"})
    assert body_first.status_code == 200


@pytest.mark.parametrize("parameters", [{"adapter_id": "demo"}, {"adapter_id": "demo", "rank": 2}, {}])
def test_the_impossible_is_told_at_once_with_what_is_attainable(server: Server, parameters: dict[str, Any]) -> None:
    response = server.generate(latency_slo_ms=1, **parameters)
    assert response.status_code == 503
    assert "retry-after" not in response.headers
    body = response.json()
    assert body["error"].startswith("latency_slo_ms 1: not attainable; at rank")
    assert not server.engine.submitted
    attainable = body["attainable"]
    again = server.generate(latency_slo_ms=2 * attainable["latency_ms"], **parameters)
    assert again.status_code == 200


def test_a_stream_tells_in_its_last_event(server: Server) -> None:
    body = {"inputs": "x", "parameters": {"adapter_id": "demo", "ttft_slo_ms": LOOSE_MS}}
    last = server.client.post("/generate_stream", json=body).text.strip().splitlines()[-1]
    assert '"met":true' in last
    assert '"rank_reason":"slo"' in last


@pytest.mark.parametrize(("slo", "is_met"), [(Slo(9000), False), (Slo(11000), True), (Slo(11000, 9000), False)])
def test_the_verdict_is_measured_from_arrival(server: Server, slo: Slo, is_met: bool) -> None:
    measurement = _measurement(server, slo, arrived_at=time.monotonic() - 10)
    sequence = measurement.sequence(None, Ask(5, 2))
    with sequence.in_flight():
        pass
    sequence.on_event(TokenEvent("id", Token(1, "x", 0.0), Mode.BASE))
    assert str(measurement.is_met) == "None"
    sequence.on_event(Finished("id", FinishReason.LENGTH, "x", Mode.BASE, Usage(5, 1, 0.0, 0.1, 0.1)))
    assert measurement.is_met is is_met
    assert server.metric("dylora_slo_total", policy="p", met=str(is_met).lower()) == 1


def test_what_the_client_ends_is_not_judged_and_what_fails_is_missed(server: Server) -> None:
    for end, is_met in ((Aborted("id"), None), (Failed("id", EngineFailed("no")), False)):
        measurement = _measurement(server, Slo(1e6), arrived_at=time.monotonic())
        sequence = measurement.sequence("version", Ask(5, 2))
        with sequence.in_flight():
            assert server.services.auto_rank.book.in_flight == 1
        sequence.on_event(end)
        assert measurement.is_met is is_met
        assert server.services.auto_rank.book.in_flight == 0


def _measurement(server: Server, slo: Slo, arrived_at: float) -> Measurement:
    services, decision = server.services, RankDecision(1, RankReason.REQUESTED, "p")
    return Measurement(services.auto_rank, services.metrics, slo=slo, decision=decision, predicted=None, arrived_at=arrived_at)


def test_the_counts_are_those_of_the_clients_own(server: Server) -> None:
    decisions: Counter[tuple[str, str, str]] = Counter()
    verdicts: Counter[tuple[str, str]] = Counter()
    wishes: list[dict[str, Any]] = [
        {"latency_slo_ms": LOOSE_MS},
        {"latency_slo_ms": LOOSE_MS, "rank": 1},
        {"latency_slo_ms": LOOSE_MS, "rank": "max"},
        {"ttft_slo_ms": LOOSE_MS, "rank": "auto", "rank_policy": "latency"},
        {"latency_slo_ms": 1},
        {"itl_slo_ms": 0.01, "rank": 3},
        {"rank": 2},
        {},
        {"latency_slo_ms": LOOSE_MS, "best_of": 3, "do_sample": True},
    ]
    for wish in [*wishes, *wishes[:3]]:
        response = server.generate(adapter_id="demo", details=True, max_new_tokens=3, **wish)
        if response.status_code == 503:
            verdicts["requested" if "rank" in wish else "latency", "refused"] += 1
            continue
        details = response.json()["details"]
        decisions[details["rank_policy"], details["rank_reason"], str(details["rank"])] += 1
        if "slo" in details:
            verdicts[details["rank_policy"], str(details["slo"]["met"]).lower()] += 1
    counted = server.services.metrics.registry
    assert _series(counted, "dylora_rank_decisions_total", ("policy", "reason", "rank")) == decisions
    assert _series(counted, "dylora_slo_total", ("policy", "met")) == verdicts


def _series(registry: Any, name: str, labels: tuple[str, ...]) -> dict[tuple[str, ...], float]:
    samples = (sample for family in registry.collect() for sample in family.samples if sample.name == name)
    return {tuple(sample.labels[label] for label in labels): sample.value for sample in samples}


def test_the_openai_routes_take_objectives_by_the_same_names(server: Server) -> None:
    body = {"model": "demo", "prompt": "x", "max_tokens": 3}
    response = server.client.post("/v1/completions", json={**body, "latency_slo_ms": LOOSE_MS})
    assert (response.headers["x-lora-rank-reason"], response.headers["x-slo-met"]) == ("slo", "true")
    impossible = server.client.post("/v1/completions", json=body, headers={"X-TTFT-SLO-Ms": "0.01"})
    assert impossible.status_code == 503
    assert impossible.json()["error"]["code"] == "slo_unattainable"
    assert impossible.json()["attainable"]["ttft_ms"] > 0.01


def test_the_base_has_objectives_too(server: Server) -> None:
    response = server.generate(latency_slo_ms=LOOSE_MS, details=True)
    assert response.json()["details"]["slo"]["met"] is True
    assert server.metric("dylora_slo_total", policy="base", met="true") == 1


def test_without_measurements_the_energy_is_the_prior(server: Server) -> None:
    plain = server.services.registry.resolve("plain").facts
    assert plain.quality is None and plain.prior is not None
    assert plain.prior.source == "energy prior"
    assert server.services.registry.resolve("demo").facts.prior is None
    assert server.generate(adapter_id="plain", latency_slo_ms=LOOSE_MS).headers["x-lora-rank"] == "4"


def test_key_adapter_and_server_have_policies_of_their_own(tmp_path: Path) -> None:
    quick = {"kind": "latency", "latency_slo_ms": LOOSE_MS, "ceiling": 2}
    policies = json.dumps({"quick": quick, "lax": {"kind": "latency", "ttft_slo_ms": LOOSE_MS}})
    stored = {"demo": adapter(), "own": replace(adapter(seed=2), quality=PROFILE)}
    keys = {key.name: key for key in (make_key("alice", rank_policy="quick"), make_key("bob"))}
    settings: dict[str, Any] = {
        "policies": policies,
        "adapter_policies": '{"own": "lax"}',
        "latency_slo_ms": 1e6,
        "default_policy": "latency",
    }
    with in_process(tmp_path, stored=stored, api_keys_file=write_keys(tmp_path / "keys", *keys.values()), **settings) as server:
        server.services.auto_rank.model.adopt(known_statistics())

        def served(key: str, name: str) -> tuple[str, str, str]:
            response = server.generate(adapter_id=name, details=True, headers=keys[key].headers)
            details = response.json()["details"]
            return details["rank_policy"], details["rank_reason"], response.headers["x-slo-met"]

        assert served("alice", "own") == ("quick", "slo", "true")
        assert served("bob", "own") == ("lax", "slo", "true")
        assert served("bob", "demo") == ("latency", "slo", "true")


def test_before_anything_is_known_the_full_rank_serves(tmp_path: Path) -> None:
    with in_process(tmp_path) as server:
        response = server.generate(adapter_id="demo", latency_slo_ms=5, details=True)
        assert (response.headers["x-lora-rank"], response.headers["x-lora-rank-reason"]) == ("4", "default")
        assert "predicted" not in response.json()["details"]


def test_nothing_stays_in_the_book(server: Server) -> None:
    server.engine.fail_next("no")
    server.generate(adapter_id="demo", latency_slo_ms=LOOSE_MS)
    server.generate(adapter_id="demo", best_of=3, do_sample=True)
    server.generate(adapter_id="demo", max_new_tokens=5, best_of=13, do_sample=True)  # more than the engine takes
    assert server.engine.wait_until(lambda stats: not stats.running + stats.waiting)  # it gives up those it took
    book = server.services.auto_rank.book
    assert (book.in_flight, book.adapters, book.context_tokens) == (0, 0, 0)
    assert not book.columns.any() and not book.row_ranks.any() and not book.requests
    assert server.metric("dylora_slo_total", policy="latency", met="false") == 1


class Steps:
    """An observer of the engine that does what a test wants after each step."""

    def __init__(self, act: Callable[[LoadBook], None]) -> None:
        self.act = act
        self.book: LoadBook | None = None

    def on_step(self, report: StepReport) -> None:
        if self.book is not None:
            self.act(self.book)

    def on_merge(self, seconds: float) -> None:
        pass


@contextmanager
def stepping(root: Path, act: Callable[[LoadBook], None]) -> Iterator[Server]:
    """A server whose engine does something after each step."""
    steps = Steps(act)
    with in_process(root, engine=FakeEngine(steps)) as server:
        server.services.auto_rank.model.adopt(known_statistics())
        steps.book = server.services.auto_rank.book
        yield server


def test_a_rank_that_is_changed_is_told_in_the_answer_and_counted_as_it_was_chosen(tmp_path: Path) -> None:
    def lower(book: LoadBook) -> None:
        for request in list(book.movable):
            if request.generated == 1:
                book.change_rank(request, 1)

    with stepping(tmp_path, lower) as server:
        asked: dict[str, Any] = {"adapter_id": "demo", "latency_slo_ms": LOOSE_MS, "max_new_tokens": 6}
        response = server.generate(**asked, details=True)
        details = response.json()["details"]
        assert details["rank_segments"] == [{"rank": 4, "tokens": 2}, {"rank": 1, "tokens": 4}]
        assert (details["rank"], response.headers["x-lora-rank"], details["rank_reason"]) == (1, "1", "slo")
        body = {"inputs": "x", "parameters": asked}
        last = server.client.post("/generate_stream", json=body).text.strip().splitlines()[-1]
        assert '"rank_segments":[{"rank":4,"tokens":2},{"rank":1,"tokens":4}]' in last
        assert server.metric("dylora_rank_decisions_total", policy="latency", reason="slo", rank="4") == 2
        assert server.metric("dylora_rank_changes_total", direction="down") == 2
        assert server.metric("dylora_requests_total", adapter="demo", rank="1", outcome="ok", mode="merged") == 2
        tradeoff = server.client.get("/adapters/demo/tradeoff").json()
        assert all(not rank["requests"] for rank in tradeoff["ranks"]), "its latency is that of no rank"


@pytest.mark.parametrize("more", [{"rank": 2}, {"best_of": 2, "do_sample": True}, {"rank": "max"}])
def test_a_rank_that_was_named_and_those_of_several_answers_are_kept(tmp_path: Path, more: dict[str, Any]) -> None:
    seen: list[int] = []
    with stepping(tmp_path, lambda book: seen.append(len(book.movable))) as server:
        assert server.generate(adapter_id="demo", latency_slo_ms=LOOSE_MS, **more).status_code == 200
    assert set(seen) == {0}


def test_a_request_of_several_sequences_is_predicted_to_take_what_all_of_them_take(tmp_path: Path) -> None:
    with in_process(tmp_path, engine=FakeEngine(max_running=64)) as server:
        server.services.auto_rank.model.adopt(known_statistics())

        def predicted_ms(copies: int, **more: Any) -> float:
            body = {"model": "demo", "prompt": "x", "max_tokens": 60, "n": copies, "ignore_eos": True, **more}
            response = server.client.post("/v1/completions", json=body)
            assert response.status_code == 200
            return float(response.headers["x-predicted-latency-ms"])

        for more in ({"latency_slo_ms": LOOSE_MS}, {"rank": 2}, {"model": "base"}):
            assert predicted_ms(64, **more) > 1.5 * predicted_ms(1, **more)
        assert server.services.auto_rank.book.in_flight == 0


@pytest.mark.parametrize("count", [1, 3])
def test_only_what_one_sequence_misses_is_learned_from(server: Server, count: int) -> None:
    services, facts = server.services, server.services.registry.resolve("demo").facts
    decision = RankDecision(4, RankReason.SLO, "latency", Slo(1), ladder=facts.ladder(1, 4))
    late = Measurement(
        services.auto_rank, services.metrics, slo=Slo(1), decision=decision, predicted=None, arrived_at=time.monotonic() - 10
    )
    sequences = [late.sequence("version", Ask(5, 2)) for _ in range(count)]
    for each in sequences:
        with each.in_flight():
            pass
        each.on_event(TokenEvent("id", Token(1, "x", 0.0), Mode.MIXED))
        each.on_event(Finished("id", FinishReason.LENGTH, "x", Mode.MIXED, Usage(5, 1, 0.0, 0.1, 0.1)))
    assert late.is_met is False
    assert (services.auto_rank.safety.value > 1) is (count == 1)
