"""Issue story: the composed server and Prometheus. Every query of the dashboard and every rule is answered there."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from loadtests.server_process import free_port
from tests.containers.podman import Podman
from tests.dashboard import expressions, filled_in, metric_names
from tests.e2e.tiny_server import wait_until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3000)]

COMPOSE = Path(__file__).resolve().parents[2] / "docker" / "compose.yaml"
START_S = 180
ANSWER_S = 120


@dataclass(frozen=True)
class Stack:
    """The composed services, from outside."""

    server: httpx.Client
    prometheus: str

    def query(self, expression: str) -> str:
        """What `promtool query instant` prints."""
        command = ("promtool", "query", "instant", self.prometheus, expression)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{expression}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def load(self) -> None:
        """A few requests of several adapters and ranks."""
        for adapter, rank in (("mr-to-text", 1), ("mr-to-text", 16), ("text-to-mr", 4), (None, None)):
            parameters = {"adapter_id": adapter, "rank": rank, "max_new_tokens": 12}
            given = {name: value for name, value in parameters.items() if value is not None}
            self.server.post("/generate", json={"inputs": "name[The Vaults]", "parameters": given}).raise_for_status()
        slo = {"adapter_id": "mr-to-text", "latency_slo_ms": 60_000, "max_new_tokens": 4}
        self.server.post("/generate", json={"inputs": "name[The Vaults]", "parameters": slo}).raise_for_status()
        self.server.post("/generate", json={"inputs": "x", "parameters": {"adapter_id": "nobody"}})


@pytest.fixture(scope="module")
def stack(podman: Podman, server_image: str, prometheus_image: str) -> Iterator[Stack]:
    server_port, prometheus_port = free_port(), free_port()
    environment = {
        "SERVER_IMAGE": server_image,
        "PROMETHEUS_IMAGE": prometheus_image,
        "SERVER_PUBLISHED_PORT": str(server_port),
        "PROMETHEUS_PUBLISHED_PORT": str(prometheus_port),
        "SHADOW_SHARE": "1",
    }
    podman.compose(COMPOSE, "up", "--detach", "--no-build", "server", "prometheus", environment=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{server_port}", timeout=60) as server:
            stack = Stack(server, f"http://127.0.0.1:{prometheus_port}")
            wait_until(lambda: _answers(f"{server.base_url}/ready") and _answers(f"{stack.prometheus}/-/ready"), START_S)
            yield stack
    finally:
        podman.compose(COMPOSE, "down", "--volumes", "--timeout", "5", environment=environment)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_prometheus_reads_the_server(stack: Stack) -> None:
    wait_until(lambda: stack.query('up{job="dylora"} == 1') != "", ANSWER_S)


def test_promtool_accepts_the_metrics(stack: Stack) -> None:
    stack.load()
    exposition = stack.server.get("/metrics").content
    subprocess.run(["promtool", "check", "metrics"], input=exposition, check=True, capture_output=True)


def test_every_query_of_the_dashboard_has_an_answer(stack: Stack) -> None:
    stack.load()
    # With a sample: a rank that is changed while a request runs, for one, is not to be had at will.
    samples = re.findall(r"^(dylora_\w+?)(?:_total|_bucket|_sum|_count)?[{ ]", stack.server.get("/metrics").text, re.MULTILINE)
    served = set(samples)
    empty = {filled_in(each, "BLEU"): metric_names(each) for each in expressions()}

    def all_answered() -> bool:
        stack.load()
        for expression in list(empty):
            answer = stack.query(expression)
            # Where the server has the series, something must come of it; where it does not yet, the query must be legal.
            if answer or not empty[expression] <= served:
                del empty[expression]
        return not empty

    try:
        wait_until(all_answered, ANSWER_S)
    except AssertionError:
        raise AssertionError(f"no answer to: {list(empty)}") from None


def test_prometheus_evaluates_the_rules(stack: Stack) -> None:
    def rules() -> list[dict[str, object]]:
        groups = httpx.get(f"{stack.prometheus}/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()), ANSWER_S)
    assert {rule["health"] for rule in rules()} == {"ok"}
    assert {rule["state"] for rule in rules() if rule["type"] == "alerting"} == {"inactive"}
