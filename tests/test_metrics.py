import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.core import Aborted, EngineStats, Finished, FinishReason, Mode, StepReport, Token, TokenEvent, Usage
from service.http.generation.tracking import RequestTracker, TrackedRequest
from service.http.latencies import Latencies
from service.http.limits import DrainRate
from service.http.metrics import RANKS_PER_ADAPTER, Metrics
from tests.fake_engine import FakeEngine
from tests.http_harness import PROFILE, Server, adapter, files_of, folder_of, in_process

NAMES = {
    "dylora_requests",
    "dylora_request_seconds",
    "dylora_time_to_first_token_seconds",
    "dylora_inter_token_seconds",
    "dylora_queue_seconds",
    "dylora_tokens",
    "dylora_rank_changes",
    "dylora_rank_decisions",
    "dylora_slo",
    "dylora_shadow_divergence",
    "dylora_refused",
    "dylora_adapter_quality",
    "dylora_merged_cache_hits",
    "dylora_merged_cache_misses",
    "dylora_merged_cache_evictions",
    "dylora_merged_cache_bytes",
    "dylora_prefix_cache_hits",
    "dylora_prefix_cache_misses",
    "dylora_prefix_cache_evictions",
    "dylora_prefix_reused_tokens",
    "dylora_merge_seconds",
    "dylora_step_seconds",
    "dylora_batch_rows",
    "dylora_kv_blocks",
    "dylora_requests_in_flight",
    "dylora_adapters",
    "dylora_adapter_load_seconds",
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    metrics_engine = FakeEngine()
    with in_process(tmp_path, engine=metrics_engine) as server:
        yield server


def test_the_names_are_those_of_the_interface(server: Server) -> None:
    families = {family.name for family in text_string_to_metric_families(server.client.get("/metrics").text)}
    assert {name for name in families if not name.endswith("_created")} == NAMES


def test_a_prompt_is_counted_once_however_many_answers_it_has(server: Server) -> None:
    body = {"prompt": ["hello", "you"], "n": 3, "max_tokens": 2}
    server.client.post("/v1/completions", json=body).raise_for_status()
    assert server.metric("dylora_tokens_total", kind="prompt") == 8
    assert server.metric("dylora_tokens_total", kind="generated") == 2 * 3 * 2


def test_requests_are_counted_by_adapter_rank_mode_and_outcome(server: Server) -> None:
    server.generate(adapter_id="demo", rank=2, max_new_tokens=5)
    server.generate(adapter_id="demo", max_new_tokens=5)
    server.generate(max_new_tokens=3)
    server.generate(adapter_id="nobody")
    server.engine.fail_next("no")
    server.generate(adapter_id="demo", rank=2)

    def requests(adapter: str, rank: str, mode: str, outcome: str) -> float | None:
        return server.metric("dylora_requests_total", adapter=adapter, rank=rank, mode=mode, outcome=outcome)

    assert requests("demo", "2", "merged", "ok") == 1
    assert requests("demo", "3", "merged", "ok") == 1
    assert requests("base", "0", "base", "ok") == 1
    assert requests("demo", "2", "none", "failed") == 1
    assert requests("", "", "none", "refused") == 1
    assert server.metric("dylora_request_seconds_count", adapter="demo", rank="2") == 1
    assert server.metric("dylora_time_to_first_token_seconds_count", adapter="demo", rank="2") == 1
    assert server.metric("dylora_inter_token_seconds_count", adapter="demo", rank="2") == 4
    assert server.metric("dylora_queue_seconds_count") == 3
    assert server.metric("dylora_tokens_total", kind="generated") == 13
    assert server.metric("dylora_tokens_total", kind="prompt") == 20
    assert server.metric("dylora_rank_decisions_total", policy="requested", reason="requested", rank="2") == 2
    assert server.metric("dylora_rank_decisions_total", policy="quality", reason="default", rank="3") == 1


def test_quality_comes_with_an_adapter_and_goes_with_it(server: Server, tmp_path: Path) -> None:
    def quality(name: str, rank: str) -> float | None:
        return server.metric("dylora_adapter_quality", adapter=name, rank=rank, metric="bleu")

    assert quality("demo", "4") == 60.0
    server.client.put("/adapters/new", files=files_of(folder_of(adapter(seed=3), tmp_path / "new")))
    assert quality("new", "1") == 40.0
    server.client.put("/adapters/demo", files=files_of(folder_of(adapter(quality=None), tmp_path / "none")))
    assert quality("demo", "4") is None
    server.client.delete("/adapters/new")
    assert quality("new", "1") is None
    assert server.metric("dylora_adapters", state="ready") == 1


def test_the_engines_counts_are_read_at_scrape(server: Server) -> None:
    assert server.metric("dylora_merged_cache_hits_total") == 3
    assert server.metric("dylora_merged_cache_bytes") == 4096
    assert server.metric("dylora_kv_blocks", state="free") == 4
    assert server.metric("dylora_requests_in_flight", state="running") == 0


def test_steps_and_merges_are_observed() -> None:
    metrics = Metrics()
    metrics.on_step(StepReport(Mode.MIXED, 10, 3, 0.02))
    metrics.on_step(StepReport(Mode.MIXED, 0, 3, 0.01))
    metrics.on_merge(0.5)
    value = metrics.registry.get_sample_value
    assert value("dylora_step_seconds_count", {"phase": "prefill"}) == 1
    assert value("dylora_step_seconds_count", {"phase": "decode"}) == 1
    assert value("dylora_batch_rows_sum") == 6
    assert value("dylora_merge_seconds_sum") == 0.5


def labels_of(metrics: Metrics) -> set[tuple[str, str]]:
    return {
        (sample.labels["adapter"], sample.labels["rank"])
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "dylora_requests_total"
    }


def test_past_the_bound_adapters_share_a_label() -> None:
    metrics = Metrics(max_adapters=2)
    for name in ("a", "b", "c", "d"):
        metrics.adapter_loaded(name, PROFILE, 0.1)
        metrics.ended(name, 1, "mixed", "ok")
    metrics.ended(None, 0, "base", "ok")
    assert labels_of(metrics) == {("a", "1"), ("b", "1"), ("other", "other"), ("base", "0")}
    assert metrics.registry.get_sample_value("dylora_adapter_quality", {"adapter": "c", "rank": "1", "metric": "bleu"}) is None


def test_a_deleted_adapters_place_and_series_go_to_the_next() -> None:
    metrics = Metrics(max_adapters=2)
    for name in ("a", "b"):
        metrics.ended(name, 1, "mixed", "ok")
    metrics.adapter_deleted("a")
    assert ("a", "1") in labels_of(metrics)
    metrics.ended("c", 1, "mixed", "ok")
    assert labels_of(metrics) == {("b", "1"), ("c", "1")}


def test_ranks_are_bounded_too() -> None:
    metrics = Metrics(max_adapters=1)
    for rank in range(1, 100):
        metrics.ended("a", rank, "mixed", "ok")
    assert len(labels_of(metrics)) == RANKS_PER_ADAPTER + 1
    assert ("a", "other") in labels_of(metrics)


def test_an_aborted_request_is_counted_with_what_it_made() -> None:
    metrics = Metrics()
    tracker = RequestTracker(metrics, DrainRate(), Latencies(), TrackedRequest("id", "a", 2, prompt_tokens=7), arrived_at=0.0)
    tracker.on_event(TokenEvent("id", Token(1, "x", 0.0), Mode.MIXED, rank=2))
    tracker.on_event(Aborted("id"))
    labels = {"adapter": "a", "rank": "2", "mode": "mixed", "outcome": "aborted"}
    assert metrics.registry.get_sample_value("dylora_requests_total", labels) == 1
    assert metrics.registry.get_sample_value("dylora_tokens_total", {"kind": "generated"}) == 1


def test_a_scrape_works_before_the_engine_starts() -> None:
    metrics = Metrics()
    metrics.watch(lambda: EngineStats(), lambda: {"ready": 0})
    assert b"dylora_kv_blocks" in metrics.exposition()


def test_times_are_counted_from_the_arrival() -> None:
    metrics = Metrics()
    request, arrived_at = TrackedRequest("id", "a", 2, prompt_tokens=7), time.monotonic() - 10
    tracker = RequestTracker(metrics, DrainRate(), Latencies(), request, arrived_at)
    tracker.on_event(TokenEvent("id", Token(1, "x", 0.0), Mode.MIXED, rank=2))
    tracker.on_event(Finished("id", FinishReason.LENGTH, "x", Mode.MIXED, Usage(7, 1, 0.0, 0.0, 0.0)))
    labels = {"adapter": "a", "rank": "2"}
    for name, of in (("time_to_first_token", labels), ("request", labels), ("queue", {})):
        seconds = metrics.registry.get_sample_value(f"dylora_{name}_seconds_sum", of)
        assert seconds is not None and seconds >= 10
