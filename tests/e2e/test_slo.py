"""Issue story: a request says by when it needs its answer; its counts and the server's own are the same."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.tiny_server import Client


@pytest.fixture
def adapters(client: Client, adapter_folders: tuple[Path, ...]) -> Iterator[tuple[str, ...]]:
    names = tuple(f"slo-{number}" for number, _ in enumerate(adapter_folders))
    for name, folder in zip(names, adapter_folders, strict=True):
        client.put(name, folder).raise_for_status()
    yield names
    for name in names:
        client.http.delete(f"/adapters/{name}").raise_for_status()


def test_under_load_the_servers_counts_are_the_clients(client: Client, adapters: tuple[str, ...]) -> None:
    for name in adapters:  # steps to learn from: the shared server makes no sweep
        client.generate(adapter_id=name, rank="max", tokens=20).raise_for_status()
    before = counted(client)
    wishes: list[dict[str, Any]] = [
        {"adapter_id": name, "latency_slo_ms": slo_ms, **rank}
        for name in adapters
        for slo_ms in (0.001, 30, 300, 1e7)
        for rank in ({}, {"rank": 2}, {"rank": "auto"})
    ]
    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(lambda wish: client.generate(tokens=16, **wish), wishes))
    own: Counter[tuple[str, str]] = Counter()
    for wish, response in zip(wishes, responses, strict=True):
        if response.status_code == 503:
            assert response.json()["error_type"] == "slo_unattainable"
            assert response.json()["attainable"]["latency_ms"] > wish["latency_slo_ms"]
            own["requested" if wish.get("rank") == 2 else "latency", "refused"] += 1
            continue
        details = response.raise_for_status().json()["details"]
        assert details["predicted"]["latency_ms"] > 0
        assert response.headers["x-slo-met"] == str(details["slo"]["met"]).lower()
        own[details["rank_policy"], response.headers["x-slo-met"]] += 1
        if wish["latency_slo_ms"] == 1e7 and wish.get("rank") != 2:
            # At whichever rank: all pay one price, which those with 30 ms may have driven up.
            assert (details["rank_reason"], details["slo"]["met"]) == ("slo", True)
    assert counted(client) - before == own
    assert own["latency", "refused"] >= 8


def counted(client: Client) -> Counter[tuple[str, str]]:
    """The server's verdicts since its start."""
    pairs = [(policy, met) for policy in ("latency", "requested") for met in ("true", "false", "refused")]
    return Counter({pair: int(client.metric("dylora_slo_total", policy=pair[0], met=pair[1])) for pair in pairs})
