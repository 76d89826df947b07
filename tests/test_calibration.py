"""What a rank costs and brings: the trade-off as measured, and quality measured on a client's texts."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from service.core import Usage
from service.http.adapters.calibration import MAX_UNFINISHED, METRIC
from service.http.latencies import WINDOW, Latencies, Percentiles
from tests.e2e.tiny_server import wait_until
from tests.fake_engine import FakeEngine
from tests.http_harness import Server, adapter, files_of, folder_of, in_process

TEXTS = [{"prompt": "ab", "completion": "cd"}, "xyz"]
LOSS = (sum(map(ord, "cd")) + sum(map(ord, "yz"))) / 64 / 4
"""What the fake engine says of these texts, at every rank."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    stored = {"demo": adapter(), "plain": adapter(seed=1, quality=None)}
    with in_process(tmp_path, stored=stored, engine=FakeEngine(max_context_tokens=100)) as server:
        yield server


def calibrate(server: Server, name: str = "plain", **fields: Any) -> httpx.Response:
    return server.client.post(f"/adapters/{name}/calibration", json={"examples": TEXTS, **fields})


def ended(server: Server, started: httpx.Response) -> dict[str, Any]:
    """The job once it is over."""
    assert started.status_code == 202, started.text
    give_up_at = time.monotonic() + 20
    while True:
        job: dict[str, Any] = server.client.get(started.headers["location"]).raise_for_status().json()
        if job["state"] not in ("waiting", "running"):
            return job
        assert time.monotonic() < give_up_at, job


def test_a_calibration_becomes_the_quality_profile(server: Server) -> None:
    before = server.store.load(server.store.get("plain"))
    job = ended(server, calibrate(server, source="two texts"))
    assert (job["state"], job["problem"], job["done"], job["total"]) == ("done", None, 10, 10)
    assert job["values"] == {str(rank): pytest.approx(LOSS) for rank in range(5)}
    quality = server.client.get("/adapters/plain").json()["quality"]
    assert (quality["metric"], quality["higher_is_better"], quality["source"]) == (METRIC, False, "two texts")
    assert set(quality["values"]) == {"1", "2", "3", "4"}
    stored = server.store.get("plain")
    assert stored.quality is not None
    assert stored.quality.examples == 2
    assert stored.quality.primary.base == pytest.approx(LOSS)
    after = server.store.load(stored)
    for path, module in before.modules.items():
        assert torch.equal(module.a, after.modules[path].a)
        assert torch.equal(module.b, after.modules[path].b)
    # All ranks are as good as the best: the smallest serves.
    answer = server.generate(adapter_id="plain", rank_policy="quality")
    assert (answer.headers["x-lora-rank"], answer.headers["x-lora-rank-reason"]) == ("1", "quality")


def test_only_the_ranks_asked_for_are_measured(server: Server) -> None:
    job = ended(server, calibrate(server, ranks=[4, 2, 4]))
    assert set(job["values"]) == {"0", "2", "4"}
    refused = calibrate(server, ranks=[9])
    assert refused.status_code == 422
    assert "legal ranks: 1, 2, 3, 4" in refused.json()["error"]


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([], "at least 1"),
        (["x"] * 1001, "at most 1000"),
        (["x"], "examples.0: has no token to measure"),
        (["xy", "x" * 100], "examples.1: has 100 tokens; legal: up to 99"),
        ([{"prompt": "x"}], "examples.0.completion: must be given"),
        ([{"prompt": "x", "completion": ""}], "must not be empty"),
        ([3], "examples.0"),
    ],
)
def test_texts_that_can_not_be_measured_are_refused(server: Server, examples: list[Any], said: str) -> None:
    response = calibrate(server, examples=examples)
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert said in response.json()["error"]


def test_one_at_a_time_and_not_without_end(tmp_path: Path) -> None:
    stored = {f"a{number}": adapter(seed=number) for number in range(MAX_UNFINISHED + 1)}
    with in_process(tmp_path, stored=stored) as server:
        with server.engine.paused():
            started = [calibrate(server, name) for name in list(stored)[:MAX_UNFINISHED]]
            assert calibrate(server, "a0").status_code == 409
            full = calibrate(server, f"a{MAX_UNFINISHED}")
            assert (full.status_code, full.headers["retry-after"]) == (503, "10")
            states = [server.client.get(each.headers["location"]).json()["state"] for each in started]
            assert "waiting" in states
        assert {ended(server, each)["state"] for each in started} == {"done"}


def test_what_clients_ask_for_comes_first(tmp_path: Path) -> None:
    engine = FakeEngine(max_running=1)
    with in_process(tmp_path, engine=engine) as server:
        with engine.paused():
            job = calibrate(server, "demo", ranks=[1])
            assert engine.wait_until(lambda stats: stats.running == 1)
        assert ended(server, job)["state"] == "done"
        assert all(len(request.prompt_ids) <= 4 for request in engine.submitted)


def test_deletion_ends_a_calibration_and_leaves_nothing_behind(server: Server) -> None:
    engine = server.engine
    with engine.paused():
        job = calibrate(server)
        assert engine.wait_until(lambda stats: stats.running == 1)
        assert server.client.delete("/adapters/plain").status_code == 204
    assert engine.wait_until(lambda stats: stats.running == 0)
    assert server.client.get(job.headers["location"]).status_code == 404
    assert server.services.calibrations.get("plain", job.json()["id"]).state == "cancelled"


def test_a_calibration_can_be_cancelled(server: Server) -> None:
    engine = server.engine
    with engine.paused():
        job = calibrate(server)
        assert engine.wait_until(lambda stats: stats.running == 1)
        told = server.client.delete(job.headers["location"])
        assert (told.status_code, told.json()["state"]) == (200, "cancelled")
    assert engine.wait_until(lambda stats: stats.running == 0)
    assert server.client.get("/adapters/plain").json()["quality"] is None
    assert server.client.get(job.headers["location"]).json()["state"] == "cancelled"
    assert server.client.delete("/adapters/plain/calibration/nothing").status_code == 404
    again = ended(server, calibrate(server))
    assert again["state"] == "done"
    over = server.client.delete(f"/adapters/plain/calibration/{again['id']}")
    assert (over.status_code, over.json()["state"]) == (200, "done")


def test_a_result_that_is_being_stored_is_neither_cancelled_nor_brought_back_after_a_deletion(server: Server) -> None:
    with ThreadPoolExecutor() as pool:
        with server.engine.hold_loads():
            job = calibrate(server)
            wait_until(lambda: server.services.calibrations.get("plain", job.json()["id"]).is_being_kept)
            cancelling = pool.submit(server.client.delete, job.headers["location"])
            assert server.client.delete("/adapters/plain").status_code == 409
        assert cancelling.result().json()["state"] == "done"
    assert server.client.delete("/adapters/plain").status_code == 204
    assert server.client.get("/adapters/plain").status_code == 404


def test_a_replaced_adapter_keeps_its_own_profile(server: Server, tmp_path: Path) -> None:
    files = files_of(folder_of(adapter(seed=9), tmp_path / "new"))
    with server.engine.paused():
        job = calibrate(server)
        assert server.engine.wait_until(lambda stats: stats.running == 1)
        assert server.client.put("/adapters/plain", files=files).status_code == 200
    told = ended(server, job)
    assert (told["state"], told["problem"]) == ("failed", "the adapter was replaced meanwhile")
    assert server.client.get("/adapters/plain").json()["quality"]["metric"] == "bleu"


def test_a_job_is_its_adapters_own(server: Server) -> None:
    job = ended(server, calibrate(server))
    assert server.client.get(f"/adapters/demo/calibration/{job['id']}").json()["error_type"] == "job_not_found"


def test_the_tradeoff_is_what_was_measured(server: Server, tmp_path: Path) -> None:
    for rank, times in ((1, 3), (4, 1)):
        for _ in range(times):
            server.generate(adapter_id="demo", rank=rank, max_new_tokens=4)
    told = server.client.get("/adapters/demo/tradeoff").json()
    assert (told["id"], told["metric"], told["higher_is_better"]) == ("demo", "bleu", True)
    assert [each["rank"] for each in told["ranks"]] == [1, 2, 3, 4]
    assert [each["requests"] for each in told["ranks"]] == [3, 0, 0, 1]
    assert [each["quality"] for each in told["ranks"]] == [40.0, 59.0, 59.8, 60.0]
    assert [each["parameters"] for each in told["ranks"]] == [44, 88, 132, 176]
    assert [each["bytes"] for each in told["ranks"]] == [4 * each["parameters"] for each in told["ranks"]]
    first, second = told["ranks"][:2]
    assert second["request_ms"] is second["inter_token_ms"] is None
    for name in ("request_ms", "time_to_first_token_ms", "inter_token_ms"):
        assert 0 <= first[name]["p50"] <= first[name]["p90"] <= first[name]["p99"]
    ended(server, calibrate(server, "demo"))
    assert [each["requests"] for each in server.client.get("/adapters/demo/tradeoff").json()["ranks"]] == [3, 0, 0, 1]
    files = files_of(folder_of(adapter(seed=9), tmp_path / "new"))
    assert server.client.put("/adapters/demo", files=files).status_code == 200
    assert {each["requests"] for each in server.client.get("/adapters/demo/tradeoff").json()["ranks"]} == {0}


def test_percentiles_are_times_that_requests_took() -> None:
    assert Percentiles.of([]) is None
    assert Percentiles.of([0.5]) == Percentiles(500, 500, 500)
    assert Percentiles.of(number / 1000 for number in range(100, 0, -1)) == Percentiles(50, 90, 99)


def test_latencies_are_of_the_last_requests() -> None:
    latencies = Latencies()
    for number in range(2 * WINDOW):
        latencies.add("a", 1, Usage(1, 2, 0.0, 1.0, 2.0 if number < WINDOW else 4.0))
    measured = latencies.of("a", 1)
    assert measured.requests == 2 * WINDOW
    assert (measured.total, measured.inter_token) == (Percentiles(4000, 4000, 4000), Percentiles(3000, 3000, 3000))
    latencies.forget("a")
    assert latencies.of("a", 1).requests == 0
