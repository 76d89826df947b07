"""Issue story: whoever goes away frees their place, and SIGTERM finishes what runs."""

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from loadtests.server_process import ServerProcess
from tests.e2e.tiny_server import PROMPT, SMALL, Client, body, wait_until
from tests.http_harness import unread

ENDLESS = 6000
"""Tokens of a request that would run far longer than the test."""


def is_idle(client: Client) -> bool:
    return client.metric("dylora_requests_in_flight") == 0 and client.metric("dylora_kv_blocks", state="used") == 0


def test_a_stream_that_its_client_leaves_frees_its_place(client: Client) -> None:
    aborted = client.metric("dylora_requests_total", outcome="aborted")
    with client.stream(tokens=ENDLESS) as stream:
        next(stream)
        assert client.metric("dylora_requests_in_flight", state="running") == 1
        assert client.metric("dylora_kv_blocks", state="used") > 0
    wait_until(lambda: is_idle(client))
    wait_until(lambda: client.metric("dylora_requests_total", outcome="aborted") == aborted + 1)


def test_a_whole_answer_that_its_client_does_not_wait_for_frees_its_place(server: ServerProcess, client: Client) -> None:
    aborted = client.metric("dylora_requests_total", outcome="aborted")
    with unread(server.url, "/generate", body("a", ENDLESS, {})):
        wait_until(lambda: client.metric("dylora_requests_in_flight", state="running") == 1)
    wait_until(lambda: is_idle(client))
    wait_until(lambda: client.metric("dylora_requests_total", outcome="aborted") == aborted + 1)


def test_sigterm_finishes_what_runs_and_takes_nothing_new(model_folder: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "model": model_folder, "adapters_dir": tmp_path / "adapters", "drain_timeout_s": 30}
    with ServerProcess(settings, tmp_path / "log") as server, httpx.Client(base_url=server.url, timeout=60) as http:
        client = Client(http)
        tokens = 300
        alone = client.text(tokens=tokens)
        started, ends = threading.Barrier(3), []

        def stream() -> None:
            with client.stream(tokens=tokens) as received:
                first = next(received)
                started.wait()
                ends.append([first, *received][-1]["generated_text"])

        threads = [threading.Thread(target=stream) for _ in range(2)]
        for thread in threads:
            thread.start()
        started.wait()
        server.interrupt()
        refused = refusal(server.url)
        for thread in threads:
            thread.join()
        assert ends == [alone, alone]
        assert refused
        assert server.process.wait(20) == 0, server.output()


def test_openais_client_sees_a_drain_and_nothing_acknowledged_is_lost(
    model_folder: Path, adapter_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    settings = {**SMALL, "model": model_folder, "adapters_dir": tmp_path / "adapters", "drain_timeout_s": 30}
    asked: dict[str, Any] = {
        "model": "story@8",
        "prompt": PROMPT,
        "max_tokens": 600,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    with ServerProcess(settings, tmp_path / "log") as server:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            version = Client(http).put("story", adapter_folders[0]).raise_for_status().json()["version"]
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
        alone = client.completions.create(**asked).choices[0].text
        chunks = iter(client.completions.create(**asked, stream=True))
        text = next(chunks).choices[0].text
        server.interrupt()
        wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(**asked)
        assert (refused.value.status_code, refused.value.code) == (503, "unavailable")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        with pytest.raises(httpx.HTTPStatusError, match="503"), httpx.Client(base_url=server.url, timeout=60) as http:
            Client(http).put("late", adapter_folders[1]).raise_for_status()
        rest = list(chunks)
        assert text + "".join(chunk.choices[0].text for chunk in rest) == alone
        assert rest[-1].choices[0].finish_reason == "length"
        assert server.process.wait(20) == 0, server.output()
        server.start()
        assert {each.id for each in client.models.list()} == {str(model_folder), "story"}
        with httpx.Client(base_url=server.url, timeout=60) as http:
            assert Client(http).versions() == {"story": version}
        assert client.completions.create(**asked).choices[0].text == alone


def test_a_second_signal_ends_at_once_and_the_store_has_what_was_acknowledged(
    model_folder: Path, adapter_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    settings = {**SMALL, "model": model_folder, "adapters_dir": tmp_path / "adapters", "drain_timeout_s": 600}
    with ServerProcess(settings, tmp_path / "log") as server:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            client = Client(http)
            client.put("story", adapter_folders[0]).raise_for_status()
            before = client.versions()
            with client.stream(tokens=ENDLESS) as stream:
                next(stream)
                server.interrupt()
                wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
                server.interrupt()
                assert server.process.wait(10) == 1
        server.start()
        with httpx.Client(base_url=server.url, timeout=60) as http:
            assert Client(http).versions() == before


def refusal(url: str) -> bool:
    """True once a draining server turns a new request away, by 503 or by not listening any more."""
    for _ in range(100):
        try:
            status = httpx.post(f"{url}/generate", json=body("a", 1, {}), timeout=5).status_code
        except httpx.TransportError:
            return True
        if status == 503:
            return True
        assert status == 200
        time.sleep(0.01)
    return False
