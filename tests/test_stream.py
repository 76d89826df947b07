import asyncio
import threading

import pytest

from service.core import Aborted, Finished, GenerationRequest, SamplingParams, TokenEvent
from service.engine.fake_engine import FakeEngine
from service.errors import QueueFull
from service.http.stream import EventStream


def request(tokens: int = 5) -> GenerationRequest:
    return GenerationRequest("r", (1, 2), SamplingParams(max_new_tokens=tokens))


def test_all_events_come_in_order_and_end_with_the_terminal_one() -> None:
    async def run(engine: FakeEngine) -> None:
        events = EventStream(engine, request())
        events.submit()
        async with events:
            found = [event async for event in events]
        assert [type(event) for event in found] == [TokenEvent] * 5 + [Finished]

    with_engine(run)


def test_leaving_early_aborts_and_the_place_is_free() -> None:
    async def run(engine: FakeEngine) -> None:
        ended = threading.Event()
        events = EventStream(engine, request(400), lambda event: ended.set() if isinstance(event, Aborted) else None)
        events.submit()
        with engine.paused():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05), events:
                    async for _ in events:
                        pass
            assert await asyncio.to_thread(ended.wait, 10)
            assert engine.stats().running == 0

    with_engine(run)


def test_the_observer_hears_everything_though_nobody_reads() -> None:
    async def run(engine: FakeEngine) -> None:
        heard: list[object] = []
        done = threading.Event()

        def hear(event: object) -> None:
            heard.append(event)
            if isinstance(event, Finished):
                done.set()

        EventStream(engine, request(7), hear).submit()
        assert await asyncio.to_thread(done.wait, 10)
        assert len(heard) == 8

    with_engine(run)


def test_a_closed_loop_does_not_hurt_the_engine() -> None:
    engine = FakeEngine()
    engine.start()
    try:
        with engine.paused():

            async def leave() -> None:
                EventStream(engine, request()).submit()

            asyncio.run(leave())
        assert engine.wait_until(lambda stats: stats.running == 0)
    finally:
        engine.stop()


def test_a_refused_request_raises_at_submit() -> None:
    async def run(engine: FakeEngine) -> None:
        with engine.paused():
            for number in range(12):
                engine.submit(GenerationRequest(str(number), (1,)), lambda event: None)
            with pytest.raises(QueueFull):
                EventStream(engine, request()).submit()

    with_engine(run)


def with_engine(run: object) -> None:
    engine = FakeEngine()
    engine.start()
    try:
        asyncio.run(run(engine))  # type: ignore[operator]
    finally:
        engine.stop()
