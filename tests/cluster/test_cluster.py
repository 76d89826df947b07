"""Two replicas behind Ray Serve's proxy answer as one server does."""

import json
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray", reason="Ray is not installed here; `make test-ray` installs it")

from adapters.demo import ARTIFACTS
from loadtests.server_process import ServerProcess
from service.keys import Scope
from tests.cluster.cluster import PROXIES, Cluster
from tests.e2e.tiny_server import events, wait_until
from tests.http_keys import MadeKey, make_key, write_keys

pytestmark = pytest.mark.ray

PROMPT = "name[The Golden Palace], eatType[coffee shop], food[Chinese], priceRange[moderate], customer rating[3 out of 5]"
EVERYTHING, READER, LATE = make_key("everything"), make_key("reader", [Scope.ADAPTERS_READ]), make_key("late")
LONG = {"adapter_id": "mr-to-text", "rank": 16, "max_new_tokens": 400, "ignore_eos_token": True}
"""More than a second's work."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_keys(tmp_path_factory.mktemp("keys") / "keys.json", EVERYTHING, READER)


@pytest.fixture(scope="module", params=PROXIES.values(), ids=tuple(PROXIES))
def cluster(request: pytest.FixtureRequest, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    write_keys(keys, EVERYTHING, READER)  # without those that another cluster read again
    settings = {"adapters_dir": str(folder / "adapters"), "api_keys_file": str(keys), "threads": 1, "latency_sweep_s": 0}
    with Cluster(request.param, folder, settings, EVERYTHING.headers) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def alone(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of one server of the same model and keys."""
    root = tmp_path_factory.mktemp("alone")
    settings = {"adapters_dir": root / "adapters", "api_keys_file": keys, "threads": 1, "latency_sweep_s": 0}
    with ServerProcess(settings, root / "log") as server, EVERYTHING.http(server.url) as http:
        yield http


@pytest.mark.parametrize("rank", [1, 16])
def test_each_replica_makes_the_text_that_one_server_makes(cluster: Cluster, alone: httpx.Client, rank: int) -> None:
    parameters: dict[str, Any] = {"adapter_id": "mr-to-text", "rank": rank, "max_new_tokens": 60}
    expected = alone.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
    for answer in cluster.from_each(lambda: cluster.generate(PROMPT, **parameters)).values():
        assert answer.json() == expected.json()
        told = ("x-lora-adapter", "x-lora-adapter-version", "x-lora-rank", "x-lora-rank-reason", "x-generated-tokens")
        assert [answer.headers[name] for name in told] == [expected.headers[name] for name in told]


def test_a_stream_comes_as_it_is_made_and_ends_with_its_client(cluster: Cluster) -> None:
    def running() -> float:
        return total(cluster, "dylora_requests_in_flight", state="running")

    aborted = total(cluster, "dylora_requests_total", outcome="aborted")
    with cluster.http.stream("POST", "/generate_stream", json={"inputs": PROMPT, "parameters": LONG}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = events(answer.iter_lines())
        assert [next(lines)["token"]["id"] >= 0 for _ in range(3)] == [True] * 3
        assert running() == 1, "the rest has not been made"
    wait_until(lambda: running() == 0)
    wait_until(lambda: total(cluster, "dylora_requests_total", outcome="aborted") == aborted + 1)


def test_a_whole_stream_has_the_tokens_of_one_server(cluster: Cluster, alone: httpx.Client) -> None:
    body = {"inputs": PROMPT, "parameters": {"adapter_id": "text-to-mr", "rank": 8, "max_new_tokens": 20}}
    made = []
    for http in (cluster.http, alone):
        with http.stream("POST", "/generate_stream", json=body) as answer:
            made.append([event["token"]["id"] for event in events(answer.iter_lines())])
    assert made[0] == made[1] != []


def test_what_one_replica_takes_replaces_and_deletes_both_serve(cluster: Cluster, tmp_path: Path) -> None:
    def versions() -> set[str | None]:
        answers = cluster.from_each(lambda: cluster.generate(PROMPT, adapter_id="mine", max_new_tokens=4)).values()
        return {answer.headers.get("x-lora-adapter-version") for answer in answers}

    put = upload(cluster, "mine", "mr-to-text-lora")
    assert versions() == {put.json()["version"]}
    again = upload(cluster, "mine", "text-to-mr")
    assert again.status_code == 200
    wait_until(lambda: versions() == {again.json()["version"]})
    assert cluster.http.delete("/adapters/mine").status_code == 204
    wait_until(lambda: versions() == {None})
    answers = cluster.from_each(lambda: cluster.generate(PROMPT, adapter_id="mine"))
    assert {answer.status_code for answer in answers.values()} == {404}


BAD: Mapping[str, tuple[str, str, dict[str, Any], MadeKey | None]] = {
    "no key": ("POST", "/generate", {"json": {"inputs": "x"}}, None),
    "a key without the scope": ("POST", "/generate", {"json": {"inputs": "x"}}, READER),
    "an unknown adapter": ("POST", "/generate", {"json": {"inputs": "x", "parameters": {"adapter_id": "no"}}}, EVERYTHING),
    "an illegal rank": (
        *("POST", "/generate"),
        *({"json": {"inputs": "x", "parameters": {"adapter_id": "mr-to-text", "rank": 17}}}, EVERYTHING),
    ),
    "an unknown field": ("POST", "/generate", {"json": {"inputs": "x", "parametres": {}}}, EVERYTHING),
    "not JSON": ("POST", "/generate", {"content": b"{", "headers": {"content-type": "application/json"}}, EVERYTHING),
    "OpenAI's form": ("POST", "/v1/completions", {"json": {"model": "no", "prompt": "x"}}, EVERYTHING),
    "an upload that is none": ("PUT", "/adapters/x", {"files": {"config": b"{}"}}, EVERYTHING),
    "a body that is too large": ("POST", "/generate", {"content": b" " * (3 << 20)}, EVERYTHING),
    "no such route": ("GET", "/nowhere", {}, EVERYTHING),
    "no such method": ("DELETE", "/generate", {}, EVERYTHING),
}


@pytest.mark.parametrize("what", BAD)
def test_errors_are_those_of_one_server(cluster: Cluster, alone: httpx.Client, what: str) -> None:
    method, path, options, key = BAD[what]
    headers = {**options.get("headers", {}), "Authorization": "", **(key.headers if key else {})}
    told = []
    for http in (cluster.http, alone):
        answer = http.request(method, path, **{**options, "headers": headers})
        assert answer.status_code >= 400
        told.append((answer.status_code, answer.headers["content-type"], answer.json(), answer.headers.get("retry-after")))
    assert told[0] == told[1]


def test_the_clients_request_id_comes_back_once(cluster: Cluster) -> None:
    for path in ("/health", "/nowhere"):
        answer = cluster.http.get(path, headers={"X-Request-Id": "my-own.id"})
        assert answer.headers.get_list("x-request-id") == ["my-own.id"]
        assert len(cluster.http.get(path).headers.get_list("x-request-id")) == 1


def test_requests_that_name_an_adapter_in_the_header_stay_together(cluster: Cluster) -> None:
    homes = {}
    for number in range(16):
        name = f"no-{number}"
        replicas = {cluster.generate(PROMPT, {"X-LoRA-Adapter": name}, max_new_tokens=1).headers["x-replica"] for _ in range(4)}
        assert len(replicas) == 1
        homes[name] = replicas.pop()
    assert len(set(homes.values())) == 2, "not all of them in one place"


def test_a_calibration_is_asked_for_where_it_was_begun(cluster: Cluster) -> None:
    """By the adapter's name in the header, which leads to one replica; what was measured is everybody's."""
    old, home = upload(cluster, "measured", "mr-to-text-lora").json()["version"], {"X-LoRA-Adapter": "measured"}
    body = {"examples": [{"prompt": PROMPT, "completion": " A coffee shop."}], "ranks": [1, 2]}
    begun = cluster.http.post("/adapters/measured/calibration", json=body, headers=home)
    assert begun.status_code == 202

    def is_done() -> bool:
        return bool(cluster.http.get(begun.headers["location"], headers=home).raise_for_status().json()["state"] == "done")

    wait_until(is_done, 30)

    def told() -> list[str]:
        answers = cluster.from_each(lambda: cluster.http.get("/adapters/measured")).values()
        return [answer.json()["quality"]["metric"] for answer in answers if answer.json()["version"] != old]

    wait_until(lambda: told() == ["loss per token"] * 2)
    assert cluster.http.delete("/adapters/measured").status_code == 204


def test_a_scrape_tells_of_all_replicas(cluster: Cluster) -> None:
    before = total(cluster, "dylora_requests_total", outcome="ok")
    for _ in range(7):
        assert cluster.generate(PROMPT, max_new_tokens=1).status_code == 200
    assert total(cluster, "dylora_requests_total", outcome="ok") == before + 7
    for answer in cluster.from_each(lambda: cluster.http.get("/metrics")).values():
        for replica in cluster.replicas():
            assert f'dylora_kv_blocks{{replica="{replica}",state="free"}}' in answer.text
    wait_until(lambda: total(cluster, "dylora_adapters", state="ready") == 2 * len(cluster.http.get("/adapters").json()))
    assert cluster.http.get("/metrics", headers=READER.headers).status_code == 403


def test_a_killed_replica_comes_back_with_what_was_uploaded(cluster: Cluster) -> None:
    version = upload(cluster, "kept", "mr-to-text-lora").json()["version"]
    before = cluster.replicas()
    victim, *others = cluster.processes()
    assert len(others) == 1
    victim.send_signal(signal.SIGKILL)
    wait_until(lambda: len(cluster.replicas()) == 2 and cluster.replicas() != before, 60)
    for answer in cluster.from_each(lambda: cluster.generate(PROMPT, adapter_id="kept", max_new_tokens=4)).values():
        assert (answer.status_code, answer.headers["x-lora-adapter-version"]) == (200, version)


def test_another_user_config_reads_the_keys_again(cluster: Cluster, keys: Path) -> None:
    assert cluster.http.get("/adapters", headers=LATE.headers).status_code == 401
    before = cluster.replicas()
    write_keys(keys, EVERYTHING, READER, LATE)
    cluster.deploy(user_config={"keys": 2})
    answers: dict[str, int] = {}

    def both_let_it_in() -> bool:
        answer = cluster.http.get("/adapters", headers=LATE.headers)
        answers[answer.headers["x-replica"]] = answer.status_code
        return list(answers.values()) == [200, 200]

    wait_until(both_let_it_in, 30)
    wait_until(lambda: cluster.replicas() == before)  # nobody was started anew; who reads is left out for a moment


def test_an_update_lets_what_runs_end(cluster: Cluster) -> None:
    """Another setting: every replica is replaced by one that has it."""
    before = cluster.replicas()
    with cluster.http.stream("POST", "/generate_stream", json={"inputs": PROMPT, "parameters": LONG}) as answer:
        lines = events(answer.iter_lines())
        next(lines)
        cluster.deploy({"max_new_tokens_limit": 500}, user_config={"keys": 2})
        assert 1 + len([*lines]) == LONG["max_new_tokens"]
    wait_until(lambda: len(cluster.replicas()) == 2 and not cluster.replicas() & before, 90)
    refused = cluster.from_each(lambda: cluster.generate(PROMPT, max_new_tokens=501))
    assert {answer.status_code for answer in refused.values()} == {422}


def upload(cluster: Cluster, name: str, shipped: str) -> httpx.Response:
    """PUT one of the demo's adapters under another name."""
    folder = ARTIFACTS / "adapters" / shipped
    files = {file: (file, (folder / file).read_bytes()) for file in ("adapter_config.json", "adapter_model.safetensors")}
    answer = cluster.http.put(f"/adapters/{name}", files=files)
    assert answer.status_code in (200, 201), answer.text
    return answer


def total(cluster: Cluster, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels, over all replicas."""
    found = 0.0
    for line in cluster.http.get("/metrics").raise_for_status().text.splitlines():
        series, _, value = line.rpartition(" ")
        if series.partition("{")[0] == name and all(f"{label}={json.dumps(text)}" in series for label, text in labels.items()):
            found += float(value)
    return found
