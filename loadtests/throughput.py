"""Tokens per second over HTTP, alone and with many requests at once, of the base and of a mix of adapters and ranks.

One JSON line per point. Against a server that runs (`--url`), or one that is started for it, whose start-up time and memory
are measured too. Greedy, with a fixed number of tokens per answer, so that a point is a fixed amount of work.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from loadtests.server_process import ServerProcess

PROMPT = "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5], near[Café Adriatic]"
RANKS = (1, 4, 8, 16)
WARM_UP_REQUESTS = 2

Choice = dict[str, object]
"""The parameters of a request that name its adapter and rank; empty for the base."""


@dataclass(frozen=True)
class Work:
    """What one point does.

    Attributes:
        choices: taken in turn by the requests.
        concurrency: requests in flight at any time.
        requests: their number in all.
        tokens: made by each.
    """

    point: str
    choices: Sequence[Choice]
    concurrency: int
    requests: int
    tokens: int


def main() -> None:
    """Measure every point."""
    options = _options()
    if options.url:
        asyncio.run(measure(options.url, options))
        return
    settings = dict(setting.split("=", 1) for setting in options.set)
    with tempfile.TemporaryDirectory() as folder:
        # A store of its own, so that two runs measure the same adapters.
        own = {"adapters_dir": Path(folder) / "adapters", "log_level": "warning", "latency_sweep_s": 0, **settings}
        with ServerProcess(own, Path(folder) / "log") as server:
            show(point="start", seconds=round(server.start_s, 2), rss_mb=_mb(server))
            asyncio.run(measure(server.url, options))
            show(point="end", rss_mb=_mb(server))


async def measure(url: str, options: argparse.Namespace) -> None:
    """Every point against one server."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=options.timeout_s, limits=limits) as http:
        adapters = (await http.get("/adapters")).raise_for_status().json()
        info = (await http.get("/info")).raise_for_status().json()
        facts = {name: info[name] for name in ("model_id", "model_parameters", "model_dtype", "model_device_type")}
        show(point="server", **facts, adapters=len(adapters))
        for work in plan(adapters, options):
            for _ in range(WARM_UP_REQUESTS):
                await run(http, Work(work.point, work.choices, len(work.choices), len(work.choices), 8))
            show(**await run(http, work))


def plan(adapters: Sequence[dict[str, Any]], options: argparse.Namespace) -> Iterator[Work]:
    """The base, one adapter at each rank, and all adapters and ranks with the base between: alone, then together."""
    mix: list[Choice] = [
        {"adapter_id": adapter["id"], "rank": rank}
        for rank in RANKS
        for adapter in adapters
        if rank in adapter["ranks"] and adapter["state"] == "ready"
    ]
    kinds: list[tuple[str, list[Choice]]] = [("base", [{}])]
    if mix:
        first = [choice for choice in mix if choice["adapter_id"] == mix[0]["adapter_id"]]
        kinds += [(f"one adapter, rank {choice['rank']}", [choice]) for choice in {1: first[0], len(first): first[-1]}.values()]
        kinds += [("mix", [{}, *mix])]
    for name, choices in kinds:
        for concurrency in (1, options.concurrency):
            requests = options.rounds * concurrency
            yield Work(name, choices, concurrency, requests, options.tokens)


async def run(http: httpx.AsyncClient, work: Work) -> dict[str, object]:
    """Do the work; its figures."""
    turns = itertools.cycle(work.choices)
    queue = [next(turns) for _ in range(work.requests)]
    seconds: list[float] = []
    generated: list[int] = []

    async def client() -> None:
        while queue:
            choice = queue.pop()
            parameters = {"max_new_tokens": work.tokens, "ignore_eos_token": True, "details": True, **choice}
            started = time.perf_counter()
            answer = await http.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
            seconds.append(time.perf_counter() - started)
            generated.append(answer.raise_for_status().json()["details"]["generated_tokens"])

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(work.concurrency)))
    wall = time.perf_counter() - started
    return {
        "point": work.point,
        "concurrency": work.concurrency,
        "requests": len(seconds),
        "tokens": sum(generated),
        "tokens_per_s": round(sum(generated) / wall, 1),
        "request_s_median": round(statistics.median(seconds), 3),
        "request_s_max": round(max(seconds), 3),
    }


def show(**figures: object) -> None:
    """Print one line."""
    print(json.dumps(figures), flush=True)


def _mb(server: ServerProcess) -> int:
    return round(server.rss_bytes() / 2**20)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.throughput", description=__doc__)
    parser.add_argument("--url", help="a server that runs; one is started unless given")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the server started")
    parser.add_argument("--tokens", type=int, default=64, help="per answer (default 64)")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at once (default 32)")
    parser.add_argument("--rounds", type=int, default=4, help="requests per client (default 4)")
    parser.add_argument("--timeout-s", type=float, default=300, help="longest wait for one answer (default 300)")
    options = parser.parse_args()
    if min(options.tokens, options.concurrency, options.rounds) < 1:
        sys.exit("tokens, concurrency and rounds are at least 1")
    return options


if __name__ == "__main__":
    main()
