"""One client of the soak: a random request after another, some of them left before they are answered."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

PROMPTS = (
    "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5], near[Café Adriatic]",
    "name[Blue Spice], eatType[coffee shop], area[city centre]",
    "name[Aromi]",
)
ADAPTERS = ("mr-to-text", "mr-to-text-lora", "text-to-mr")
CHANGING = tuple(f"soak-{number}" for number in range(6))
"""Adapters that are uploaded, replaced and deleted meanwhile."""
RANKS = (1, 2, 4, 8, 16, "max", "auto", 99)
LEGAL = {200, 201, 202, 204, 404, 409, 422, 503, 504}
_BACK_OFF_S = 0.5


@dataclass
class Books:
    """What all clients saw.

    Attributes:
        answered: by request id, how many sequences it has if it was generated, 0 if it was answered without.
        left: ids of requests whose client went away first.
        statuses: of all answers.
        problems: what must not be.
    """

    answered: dict[str, int] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    started: int = 0


class SoakClient:
    """Asks until it is told to stop.

    Args:
        uploads: files of adapters that fit the model.
    """

    def __init__(self, http: httpx.AsyncClient, dice: random.Random, books: Books, uploads: list[dict[str, bytes]]) -> None:
        self._http = http
        self._dice = dice
        self._books = books
        self._uploads = uploads
        self._actions: list[tuple[Callable[[str], Awaitable[None]], int]] = [
            (self._whole, 40),
            (self._streamed, 25),
            (self._openai, 10),
            (self._left_stream, 10),
            (self._left_whole, 5),
            (self._deadline, 2),
            (self._upload, 4),
            (self._delete, 2),
            (self._look, 2),
        ]

    async def run(self, until: float) -> None:
        """One request after another until a moment of the event loop's clock."""
        actions, weights = zip(*self._actions, strict=True)
        while asyncio.get_running_loop().time() < until:
            self._books.started += 1
            request_id = f"soak-{self._books.started}"
            action = self._dice.choices(actions, weights)[0]
            try:
                await action(request_id)
            except httpx.TransportError as error:
                self._books.problems.append(f"{request_id}: {action.__name__}: {error!r}")

    def _task(self) -> dict[str, Any]:
        dice = self._dice
        adapter = dice.choice([None, *ADAPTERS, *CHANGING])
        parameters: dict[str, Any] = {"max_new_tokens": dice.choice((1, 8, 30, 60)), "details": dice.random() < 0.5}
        if adapter:
            parameters["adapter_id"] = adapter
            if dice.random() < 0.8:
                parameters["rank"] = dice.choice(RANKS)
        if dice.random() < 0.3:
            parameters |= {"do_sample": True, "seed": dice.randrange(1000), "temperature": 0.9, "top_p": 0.9}
        return {"inputs": dice.choice(PROMPTS), "parameters": parameters}

    async def _whole(self, request_id: str) -> None:
        task = self._task()
        drawn = self._dice.choice((1, 1, 1, 3)) if "do_sample" in task["parameters"] else 1
        if drawn > 1:
            task["parameters"]["best_of"] = drawn
        answer = await self._http.post("/generate", json=task, headers={"X-Request-Id": request_id})
        await self._note(request_id, answer, sequences=drawn)

    async def _openai(self, request_id: str) -> None:
        task = self._task()
        fields = {"model": task["parameters"].get("adapter_id", "base"), "prompt": task["inputs"]}
        body = {**fields, "max_tokens": task["parameters"]["max_new_tokens"], "n": self._dice.choice((1, 2)), "stream": True}
        headers = {"X-Request-Id": request_id}
        async with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            text = (await answer.aread()).decode()
        await self._note(request_id, answer, sequences=body["n"])
        if answer.status_code == 200 and text.count("data: [DONE]") + text.count('data: {"error"') != 1:
            self._books.problems.append(f"{request_id}: a stream of OpenAI's that does not end once: {text[-300:]}")

    async def _streamed(self, request_id: str) -> None:
        headers = {"X-Request-Id": request_id}
        async with self._http.stream("POST", "/generate_stream", json=self._task(), headers=headers) as answer:
            events = [json.loads(line[5:]) async for line in answer.aiter_lines() if line.startswith("data:")]
        await self._note(request_id, answer)
        ends = [event for event in events if "error" in event or event.get("details")]
        if answer.status_code == 200 and (len(ends) != 1 or ends[0] is not events[-1]):
            self._books.problems.append(f"{request_id}: a stream with {len(ends)} ends")

    async def _left_stream(self, request_id: str) -> None:
        headers, left_after = {"X-Request-Id": request_id}, self._dice.randrange(12)
        async with self._http.stream("POST", "/generate_stream", json=self._task(), headers=headers) as answer:
            self._books.statuses[answer.status_code] += 1
            self._books.left.add(request_id)
            async for _ in answer.aiter_lines():
                left_after -= 1
                if left_after <= 0:
                    return

    async def _left_whole(self, request_id: str) -> None:
        self._books.left.add(request_id)
        try:
            async with asyncio.timeout(self._dice.uniform(0, 0.5)):
                answer = await self._http.post("/generate", json=self._task(), headers={"X-Request-Id": request_id})
            self._books.statuses[answer.status_code] += 1
        except TimeoutError:
            pass

    async def _deadline(self, request_id: str) -> None:
        headers = {"X-Request-Id": request_id, "X-Request-Timeout-Ms": str(self._dice.randrange(1, 300))}
        answer = await self._http.post("/generate", json=self._task(), headers=headers)
        await self._note(request_id, answer)

    async def _upload(self, request_id: str) -> None:
        files = self._dice.choice(self._uploads)
        url, headers = f"/adapters/{self._dice.choice(CHANGING)}", {"X-Request-Id": request_id}
        await self._note(request_id, await self._http.put(url, files=files, headers=headers), sequences=0)

    async def _delete(self, request_id: str) -> None:
        url, headers = f"/adapters/{self._dice.choice(CHANGING)}", {"X-Request-Id": request_id}
        await self._note(request_id, await self._http.delete(url, headers=headers), sequences=0)

    async def _look(self, request_id: str) -> None:
        name = self._dice.choice((*ADAPTERS, *CHANGING))
        url = self._dice.choice(
            (f"/adapters/{name}", f"/adapters/{name}/tradeoff", f"/adapters/{name}/export?rank=2", "/v1/models")
        )
        await self._note(request_id, await self._http.get(url, headers={"X-Request-Id": request_id}), sequences=0)

    async def _note(self, request_id: str, answer: httpx.Response, sequences: int = 1) -> None:
        """Take note of an answer, and wait a little where the server asks for it.

        Args:
            sequences: how many the request has if it is generated.
        """
        status = answer.status_code
        self._books.statuses[status] += 1
        self._books.answered[request_id] = sequences if status == 200 else 0
        if status == 504:  # whether its deadline passed before the engine took it or later is the server's affair
            del self._books.answered[request_id]
            self._books.left.add(request_id)
        if status not in LEGAL:
            self._books.problems.append(f"{request_id}: {status} {answer.text[:300]}")
        if answer.headers.get("x-request-id") != request_id:
            self._books.problems.append(f"{request_id}: the answer to {answer.headers.get('x-request-id')}")
        if status == 503:
            await asyncio.sleep(_BACK_OFF_S)
