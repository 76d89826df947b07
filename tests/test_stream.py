import asyncio
import threading
from contextlib import closing

import pytest

from service.core import Aborted, Failed, Finished, GenerationRequest, SamplingParams, TokenEvent
from service.errors import DeadlinePassed, QueueFull, SlowReader
from service.http.generation.stream import EventStream
from tests.fake_engine import FakeEngine


def request(tokens: int = 5) -> GenerationRequest:
    return GenerationRequest("r", (1, 2), SamplingParams(max_new_tokens=tokens))


def test_all_events_come_in_order_and_end_with_the_terminal_one() -> None:
    async def run(engine: FakeEngine) -> None:
        events = EventStream(engine, request())
        events.submit()
        with closing(events):
            found = [event async for event in events]
        assert [type(event) for event in found] == [TokenEvent] * 5 + [Finished]

    with_engine(run)


def test_leaving_early_aborts_and_the_place_is_free() -> None:
    async def run(engine: FakeEngine) -> None:
        ended = threading.Event()
        events = EventStream(engine, request(400), lambda event: ended.set() if isinstance(event, Aborted) else None)
        events.submit()
        with engine.paused():
            with pytest.raises(TimeoutError), closing(events):
                async with asyncio.timeout(0.05):
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


def test_a_cut_is_heard_by_the_reader_at_once_and_by_the_observer_when_the_engine_has_aborted() -> None:
    async def run(engine: FakeEngine) -> None:
        heard: list[object] = []
        events = EventStream(engine, request(400), heard.append)
        events.submit()
        error = DeadlinePassed(1)
        with engine.paused():
            events.cut(error)
            events.cut(DeadlinePassed(2))
            assert await events.next() == Failed("r", error)
        assert engine.wait_until(lambda stats: stats.running == 0)
        assert heard[-1] == Failed("r", error)
        assert sum(isinstance(event, Failed) for event in heard) == 1

    with_engine(run)


def test_a_cut_after_the_end_changes_nothing() -> None:
    async def run(engine: FakeEngine) -> None:
        events = EventStream(engine, request(3))
        events.submit()
        assert engine.wait_until(lambda stats: stats.running == 0)
        events.cut(DeadlinePassed(1))
        assert [type(event) for event in [event async for event in events]] == [TokenEvent] * 3 + [Finished]

    with_engine(run)


def test_a_reader_that_falls_behind_is_cut_off_and_what_waits_is_bounded() -> None:
    async def run(engine: FakeEngine) -> None:
        heard: list[object] = []
        events = EventStream(engine, request(400), heard.append, max_unread=10)
        events.submit()
        assert engine.wait_until(lambda stats: stats.running == 0)
        assert len(events._events) == 11
        end = await events.next()
        assert isinstance(end, Failed)
        assert isinstance(end.error, SlowReader)
        assert heard[-1] == end

    with_engine(run)


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
