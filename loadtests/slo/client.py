"""The open-loop client: every request is sent at its moment, however many are still without answer.

Our own, on httpx: locust and guidellm drive a number of users or one kind of request, while here each request has its own
adapter, length, deadline and moment, which all policies must get alike, and each answer's verdict is kept.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from loadtests.slo.results import Outcome
from loadtests.slo.trace import Asked

Wish = Mapping[str, object]
"""What a policy adds to a request's parameters: {"rank": 64}, {"rank": "auto"}."""


async def play(
    http: httpx.AsyncClient, asked: Sequence[Asked], wish: Wish, slo_ms: Callable[[Asked], float], quality: Mapping[int, float]
) -> list[Outcome]:
    """Send all requests at their moments; what became of each, in their order."""
    started = time.perf_counter()

    async def one(each: Asked) -> Outcome:
        await asyncio.sleep(max(0.0, started + each.at_s - time.perf_counter()))
        return await send(http, each, wish, slo_ms(each), quality)

    return list(await asyncio.gather(*(one(each) for each in asked)))


async def send(http: httpx.AsyncClient, asked: Asked, wish: Wish, slo_ms: float, quality: Mapping[int, float]) -> Outcome:
    """Send one request now."""
    parameters: dict[str, Any] = {
        "adapter_id": adapter_name(asked.adapter),
        "max_new_tokens": asked.new_tokens,
        "ignore_eos_token": True,
        "details": True,
        "latency_slo_ms": slo_ms,
        **wish,
    }
    sent = time.perf_counter()
    response = await http.post("/generate", json={"inputs": asked.prompt, "parameters": parameters})
    latency_ms = 1000 * (time.perf_counter() - sent)
    if response.status_code != 200:
        return Outcome(None, 0.0, latency_ms, slo_ms, at_s=asked.at_s)
    details = response.json()["details"]
    segments = [(each["rank"], each["tokens"]) for each in details.get("rank_segments", [])]
    segments = segments or [(details["rank"], asked.new_tokens)]
    return Outcome(
        segments[0][0],
        sum(quality[rank] * tokens for rank, tokens in segments) / asked.new_tokens,
        latency_ms,
        slo_ms,
        details["slo"]["met"],
        asked.at_s,
        details["rank_policy"],
        details["rank_reason"],
        len(segments) - 1,
    )


def adapter_name(number: int) -> str:
    """What the made-up adapters are called in the store."""
    return f"slo-{number:02}"
