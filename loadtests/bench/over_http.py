"""Concurrent streams over HTTP beside the same requests to the engine."""

import asyncio
import statistics
import string
import tempfile
import time
from pathlib import Path

import httpx
import torch

from loadtests import workload
from loadtests.bench.engine import OurEngine, load_base
from loadtests.bench.figures import Figures
from loadtests.server_process import ServerProcess

_STREAMS = 32
_TOKENS = 48


def compare_http(folder: Path, rounds: int, figures: Figures) -> None:
    """Server and engine take turns; the client runs on the same cores as the server."""
    ours = OurEngine(load_base(folder), {})
    ratios, rates = [], []
    with tempfile.TemporaryDirectory() as own:
        settings = {
            "model": folder / "base",
            "adapters_dir": Path(own) / "adapters",
            "prefix_cache": False,
            "latency_sweep_s": 0,
            "log_level": "warning",
            "threads": torch.get_num_threads(),
        }
        with ServerProcess(settings, Path(own) / "log") as server:
            for number in range(rounds + 1):
                alone = ours.run("base", _STREAMS)
                streamed = asyncio.run(_stream(server.url))
                if number:
                    ratios.append(alone / streamed)
                    rates.append(_STREAMS * _TOKENS / streamed)
    ours.close()
    figures.judge("over HTTP / engine, 32 streams", statistics.median(ratios), tokens_per_s=round(statistics.median(rates), 1))


async def _stream(url: str) -> float:
    """Seconds until the last of the streams has ended."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        started = time.perf_counter()
        await asyncio.gather(*(_one(http, row) for row in range(_STREAMS)))
        return time.perf_counter() - started


async def _one(http: httpx.AsyncClient, row: int) -> None:
    # One token a character, so that prompts are as long as those of the engine.
    prompt = "".join(string.ascii_letters[(row + at) % 52] for at in range(workload.PROMPT_TOKENS))
    body = {"inputs": prompt, "parameters": {"max_new_tokens": _TOKENS, "ignore_eos_token": True}}
    events = 0
    async with http.stream("POST", "/generate_stream", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            events += line.startswith("data:")
    if events != _TOKENS:
        raise RuntimeError(f"a stream had {events} tokens instead of {_TOKENS}")
