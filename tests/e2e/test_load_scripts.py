"""The load scripts run, and print one JSON line per point."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.server_process import ServerProcess
from loadtests.slo.plan import RunFile
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


def test_a_short_soak_leaves_nothing_behind() -> None:
    command = [sys.executable, "-m", "loadtests.soak", "--minutes", "0.1", "--clients", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    said = json.loads(done.stdout.splitlines()[-1])
    for verdict in ("every_request_ends_once", "no_500", "nothing_in_use", "integrity"):  # memory still grows at first
        assert said[verdict] is True, done.stdout + done.stderr


@pytest.mark.slow
def test_the_overhead_of_http() -> None:
    command = [sys.executable, "-m", "loadtests.http_overhead", "--modes", "mixed", "--batches", "2", "--rounds", "1"]
    done = subprocess.run([*command, "--turns", "1", "--requests", "2"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(point["point"], point["by"]) for point in points] == [
        (name, by) for name in ("tokens", "requests") for by in ("engine", "streamed", "whole")
    ]


def test_the_cost_of_a_proxy(server: ServerProcess) -> None:
    """Of none: the server stands for both."""
    command = [sys.executable, "-m", "loadtests.proxy_cost", "--direct", str(server.port), "--proxied", str(server.port)]
    sizes = ["--streams", "2", "--tokens", "4", "--rounds", "1", "--requests", "2"]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=True, timeout=100)
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(point["point"], point["by"]) for point in points] == [
        (name, by) for name in ("requests", "streams") for by in ("direct", "proxied")
    ]


def test_the_slo_experiment_and_its_report(tmp_path: Path) -> None:
    policies = ["fixed 16", "fixed 4", "elastic"]
    scenario = ":".join(["gamma:10", *policies])
    sizes = ["--adapters", "3", "--seeds", "1", "--seconds", "2", "--warm-up-s", "0", "--set", "latency_sweep_s=2"]
    sizes += ["--steady-within", "inf"]  # whatever else this machine does
    command = [sys.executable, "-m", "loadtests.slo", "--out", str(tmp_path), "--scenarios", scenario, *sizes]
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=110)
    runs = RunFile(tmp_path / "runs.jsonl").lines()
    assert [run["policy"] for run in runs] == policies
    assert all(run["counts_agree"] for run in runs)
    assert len({len(run["outcomes"]) for run in runs}) == 1

    report = [sys.executable, "-m", "loadtests.slo.report", str(tmp_path)]
    subprocess.run(report, capture_output=True, text=True, check=True, timeout=60)
    assert all(policy in (tmp_path / "slo.md").read_text() for policy in [*policies, "oracle"])
    assert (tmp_path / "frontier.svg").stat().st_size > 1000


def test_runs_on_two_simulated_machines_do_not_share_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests.slo.simulated", "--out", str(tmp_path), "--scenarios", "poisson:2:fixed 4"]
    sizes = ["--seconds", "2", "--warm-up-s", "0", "--seeds", "1", "--machine"]
    subprocess.run([*command, *sizes, "shared"], capture_output=True, check=True, timeout=60)
    before = RunFile(tmp_path / "runs.jsonl").lines()
    refused = subprocess.run([*command, *sizes, "steady"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and "has runs on the machine 'shared'" in refused.stderr
    assert RunFile(tmp_path / "runs.jsonl").lines() == before
