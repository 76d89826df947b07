"""The load scripts run, and print one JSON line per point."""

import json
import subprocess
import sys
from pathlib import Path

from loadtests.server_process import ServerProcess
from tests.e2e.tiny_server import Client


def test_throughput_against_a_running_server(server: ServerProcess, client: Client, adapter_folders: tuple[Path, ...]) -> None:
    client.put("measured", adapter_folders[0]).raise_for_status()
    command = [sys.executable, "-m", "loadtests.throughput", "--url", server.url]
    sizes = ["--tokens", "5", "--concurrency", "4", "--rounds", "2"]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=True, timeout=100)
    client.http.delete("/adapters/measured").raise_for_status()

    facts, *points = [json.loads(line) for line in done.stdout.splitlines()]
    assert facts["adapters"] == 1
    assert [(point["point"], point["concurrency"]) for point in points] == [
        (name, concurrency) for name in ("base", "one adapter, rank 1", "one adapter, rank 16", "mix") for concurrency in (1, 4)
    ]
    assert all(point["tokens"] == 5 * 2 * point["concurrency"] for point in points)
    assert all(point["tokens_per_s"] > 0 for point in points)
