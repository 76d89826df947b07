"""What HTTP costs: the same work over HTTP, streamed and whole, and by the bare engine; one JSON line per point.

The engine stands in this process and the server in its own; they take turns inside each round, so that a machine whose speed
drifts slows both. The client is a loop over sockets that reads bytes and looks at them afterwards, because it has the same
cores. Points: tokens, so many requests in flight of 48 tokens each, and when one ends the next in its place; requests, one
after another of a single token.
"""

import argparse
import json
import selectors
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import torch

from adapters.checkpoint import CONFIG_FILE, TENSORS_FILE
from loadtests import workload
from loadtests.bench.engine import OurEngine, load_adapters
from loadtests.server_process import ServerProcess
from loadtests.workload import load_base
from service.core import Compile

Run = Callable[[], float]
"""Does a fixed amount of work; seconds."""


class OverHttp:
    """The server, asked for the engine's work by token ids through /v1/completions."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server

    def run(self, mode: str, batch: int, tokens: int, turns: int = 1, *, is_streamed: bool) -> float:
        """As OurEngine.run, each request on a connection of its own."""
        requests = [self._request(mode, row, prompt, tokens, is_streamed) for row, prompt in enumerate(workload.prompts(batch))]
        started = time.perf_counter()
        answers = exchange(self._server.port, requests, turns)
        seconds = time.perf_counter() - started
        for answer in answers:
            check(answer, tokens, is_streamed)
        return seconds

    def _request(self, mode: str, row: int, prompt: Sequence[int], tokens: int, is_streamed: bool) -> bytes:
        adapter = {"base": "base", "merged": "adapter3", "mixed": f"adapter{workload.adapter_of(row)}"}[mode]
        fields = {"model": adapter, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        if adapter != "base":
            fields["rank"] = "max"
        body = json.dumps({**fields, "stream": is_streamed}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return f"{head}Connection: close\r\n\r\n".encode() + body


def exchange(port: int, requests: Sequence[bytes], turns: int = 1) -> list[bytes]:
    """What the server answers: all requests at once and, as soon as it closes one's connection, the same again."""
    answers: list[bytes] = []
    left = [turns - 1] * len(requests)
    with selectors.DefaultSelector() as selector:

        def send(row: int) -> None:
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(requests[row])
            selector.register(connection, selectors.EVENT_READ, (row, []))

        for row in range(len(requests)):
            send(row)
        while selector.get_map():
            for key, _ in selector.select():
                connection, (row, received) = key.fileobj, key.data
                assert isinstance(connection, socket.socket)
                data = connection.recv(1 << 16)
                if data:
                    received.append(data)
                    continue
                selector.unregister(connection)
                connection.close()
                answers.append(b"".join(received))
                if left[row]:
                    left[row] -= 1
                    send(row)
    return answers


def check(answer: bytes, tokens: int, is_streamed: bool) -> None:
    """Raise RuntimeError unless the answer is good and has all tokens."""
    is_good = answer.startswith(b"HTTP/1.1 200 ")
    if is_streamed:
        is_good = is_good and answer.count(b'"text":') == tokens and b"data: [DONE]" in answer
    else:
        is_good = is_good and f'"completion_tokens":{tokens},'.encode() in answer
    if not is_good:
        raise RuntimeError(f"not the answer that was asked for: {answer[:2000]!r}")


def in_turns(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round; the first, which warms up, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            took = run()
            if number:
                seconds[name].append(took)
    return seconds


def show_tokens(mode: str, batch: int, turns: int, seconds: dict[str, list[float]]) -> None:
    """Tokens per second, their ratio to the engine alone, and what a token costs beside it."""
    tokens = batch * turns * workload.NEW_TOKENS
    for name, own in seconds.items():
        pairs = list(zip(seconds["engine"], own, strict=True))
        line = {
            "point": "tokens",
            "mode": mode,
            "in_flight": batch,
            "by": name,
            "tokens_per_s": round(tokens / statistics.median(own), 1),
            "ratio_to_engine": round(statistics.median(engine / mine for engine, mine in pairs), 3),
            "us_per_token": round(statistics.median((mine - engine) / tokens for engine, mine in pairs) * 1e6, 1),
        }
        print(json.dumps(line), flush=True)


def show_requests(mode: str, count: int, seconds: dict[str, list[float]]) -> None:
    """Milliseconds of a request of one token, and what HTTP adds to it."""
    for name, own in seconds.items():
        added = statistics.median(mine - engine for engine, mine in zip(seconds["engine"], own, strict=True))
        ms = round(statistics.median(own) / count * 1e3, 2)
        line = {"point": "requests", "mode": mode, "by": name, "ms_per_request": ms, "ms_added": round(added / count * 1e3, 2)}
        print(json.dumps(line), flush=True)


def measure(engine: OurEngine, http: OverHttp, options: argparse.Namespace) -> None:
    """Every point."""
    for mode in options.modes:
        for batch in options.batches:
            runs = ways(engine, http, mode, batch, workload.NEW_TOKENS, options.turns)
            show_tokens(mode, batch, options.turns, in_turns(runs, options.rounds))
        one_by_one = ways(engine, http, mode, 1, 1, options.requests)
        show_requests(mode, options.requests, in_turns(one_by_one, options.rounds))


def ways(engine: OurEngine, http: OverHttp, mode: str, batch: int, tokens: int, turns: int) -> dict[str, Run]:
    """The same work by the engine alone and over HTTP."""
    return {
        "engine": lambda: engine.run(mode, batch, tokens, turns),
        "streamed": lambda: http.run(mode, batch, tokens, turns, is_streamed=True),
        "whole": lambda: http.run(mode, batch, tokens, turns, is_streamed=False),
    }


def main() -> None:
    """Make the work, start both, measure."""
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload.make_workload(folder)
        settings = {
            "model": folder / "base",
            "adapters_dir": folder / "store",
            "threads": options.threads,
            "compile": options.compile,
            "prefix_cache": False,  # repeated prompts must be computed again, as the engine alone does
            "latency_sweep_s": 0,
            "max_running_requests": max(options.batches),
            "log_level": options.log_level,
        }
        engine = OurEngine(load_base(folder), load_adapters(folder), options.modes, compile_=options.compile)
        try:
            with ServerProcess(settings, folder / "log", start_timeout_s=300) as server:
                _upload(server, folder)
                measure(engine, OverHttp(server), options)
        finally:
            engine.close()


def _upload(server: ServerProcess, folder: Path) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for number in range(len(workload.RANKS)):
            adapter = folder / f"adapter{number}"
            files = {each: (adapter / each).read_bytes() for each in (CONFIG_FILE, TENSORS_FILE)}
            http.put(f"/adapters/adapter{number}", files=files).raise_for_status()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.http_overhead", description=__doc__)
    parser.add_argument("--modes", nargs="+", choices=("base", "merged", "mixed"), default=["base", "mixed"], metavar="MODE")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32], metavar="ROWS")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of every point (default 3)")
    parser.add_argument("--turns", type=int, default=3, help="requests one after another in each place (default 3)")
    parser.add_argument("--requests", type=int, default=20, help="requests of one token in a round (default 20)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of engine and server (default 2)")
    parser.add_argument("--compile", type=Compile, default=Compile.AUTO, help="the setting of engine and server")
    parser.add_argument("--log-level", default="info", help="the server's (default info, as it is delivered)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
