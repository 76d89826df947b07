"""64 clients for ten minutes: whole and streamed answers, clients that leave, uploads, replacements, deletions, full queues.

One JSON line a minute, and one with the verdicts at the end; exit status 1 where one of them is bad. Asked for: every request
ends exactly once, by its client's count and by the lines of the server's log; no 500; no row and no block of the cache stays in
use; memory is flat.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx

from adapters import convert
from adapters.checkpoint import CONFIG_FILE, TENSORS_FILE
from loadtests.server_process import ServerProcess
from loadtests.soak.client import Books, SoakClient
from service.demo import demo_adapter_folders

SAMPLE_S = 5.0
WARM_UP_SHARE = 0.3
"""Of the time, after which memory has to be flat."""
MAX_GROWTH = 0.05
SETTINGS = {
    "threads": 1,
    "latency_sweep_s": 0,
    "log_format": "json",
    "max_running_requests": 32,
    "max_waiting_requests": 24,
    "kv_cache_bytes": "48MiB",
    "merged_cache_bytes": "64MiB",
    **dict.fromkeys(("header_timeout_s", "body_timeout_s", "write_timeout_s", "keep_alive_s"), 600),
}
"""Fewer places than clients, so that the queue is full at times; caches that are soon full, so that their filling is no leak;
and time enough for clients that share a busy machine with the server.
"""


class SoakServer(ServerProcess):
    """A server that checks itself at its end."""

    module = "loadtests.soak.server"


async def soak(server: ServerProcess, clients: int, seconds: float, seed: int) -> tuple[Books, list[tuple[float, int]]]:
    """All clients; what they saw, and the server's memory over time, in seconds and bytes."""
    books, memory, loop = Books(), [], asyncio.get_running_loop()
    until, started = loop.time() + seconds, loop.time()
    uploads = _uploads()
    limits = httpx.Limits(max_connections=None)

    async def watch() -> None:
        told = started
        while loop.time() < until:
            memory.append((loop.time() - started, server.rss_bytes()))
            if loop.time() >= told:
                told += 60
                show(minute=round((loop.time() - started) / 60), requests=books.started, memory_mb=memory[-1][1] >> 20)
            await asyncio.sleep(SAMPLE_S)

    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as http:
        asked = (SoakClient(http, random.Random(f"{seed}/{number}"), books, uploads).run(until) for number in range(clients))
        await asyncio.gather(watch(), *asked)
    memory.append((loop.time() - started, server.rss_bytes()))
    return books, memory


def _uploads() -> list[dict[str, bytes]]:
    """Adapters that fit the demo: its own, under other alphas, so that each is another version."""
    with tempfile.TemporaryDirectory() as name:
        found = []
        for number, folder in enumerate(demo_adapter_folders()):
            for r_max in (2, 4, 8):
                made = Path(name) / f"{number}-{r_max}"
                convert(folder, made, r_max=r_max)
                found.append({each: (made / each).read_bytes() for each in (CONFIG_FILE, TENSORS_FILE)})
        return found


def wait_until_idle(server: ServerProcess, timeout_s: float = 60) -> dict[str, float]:
    """The series of what is in use, once all are 0 or the time is over."""
    wanted = (
        'dylora_requests_in_flight{state="running"}',
        'dylora_requests_in_flight{state="waiting"}',
        'dylora_kv_blocks{state="used"}',
    )
    give_up_at = time.monotonic() + timeout_s
    while True:
        lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
        found = {name: float(line.rpartition(" ")[2]) for line in lines for name in wanted if line.startswith(name)}
        if not any(found.values()) or time.monotonic() > give_up_at:
            return found
        time.sleep(0.2)


def ends_in_log(log: Path) -> Iterator[tuple[str, str]]:
    """Request id and kind of each line that tells of an end."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        for text in lines:
            if text.startswith("{"):
                line = json.loads(text)
                if line["message"] in ("request", "answered"):
                    yield line["request_id"], line["message"]


def unlike(books: Books, log: Path) -> list[str]:
    """Requests whose lines in the log are not those of one end."""
    ends = Counter(ends_in_log(log))
    wrong = []
    for request_id, sequences in books.answered.items():
        generated, answered = ends[request_id, "request"], ends[request_id, "answered"]
        if (generated, answered) != (sequences, 0 if sequences else 1):
            wrong.append(f"{request_id}: {sequences} sequences, {generated} ends, {answered} answers in the log")
    for request_id in books.left:
        if ends[request_id, "request"] + ends[request_id, "answered"] > 1:
            wrong.append(f"{request_id}: left by its client, and ended more than once")
    return wrong


def growth_of(memory: list[tuple[float, int]]) -> float:
    """The share by which the mean of the last tenth is above that of the tenth after the warm-up."""
    first = int(WARM_UP_SHARE * len(memory))
    size = max(1, len(memory) // 10)

    def mean(samples: list[tuple[float, int]]) -> float:
        return sum(rss for _, rss in samples) / len(samples)

    return mean(memory[-size:]) / mean(memory[first : first + size]) - 1


def show(**figures: object) -> None:
    """Print one line."""
    print(json.dumps(figures), flush=True)


def main() -> int:
    """Start the server, load it, look."""
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log"
        server = SoakServer({**SETTINGS, "adapters_dir": Path(name) / "adapters"}, log)
        with server:
            books, memory = asyncio.run(soak(server, options.clients, options.minutes * 60, options.seed))
            in_use = wait_until_idle(server)
            exit_status = server.end(60)
        wrong = unlike(books, log)
    growth = growth_of(memory)
    verdicts = {
        "every_request_ends_once": not wrong and not books.problems,
        "no_500": not books.statuses[500],
        "nothing_in_use": len(in_use) == 3 and not any(in_use.values()),
        "integrity": exit_status == 0,
        "memory_flat": growth < MAX_GROWTH,
    }
    show(
        requests=books.started,
        clients=options.clients,
        minutes=options.minutes,
        left_by_client=len(books.left),
        statuses=dict(sorted(books.statuses.items())),
        memory_growth=round(growth, 4),
        memory_mb=[memory[0][1] >> 20, memory[-1][1] >> 20],
        **verdicts,
    )
    for problem in [*wrong, *books.problems][:20]:
        print(problem, file=sys.stderr)
    return 0 if all(verdicts.values()) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
