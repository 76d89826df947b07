"""No flow waits for another for longer than the stated bound."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.fair_queue import FairQueue

LARGEST = 50
FLOWS = ("a", "b", "c", None)


def test_one_flow_is_served_in_order_of_arrival() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in "xyz":
        queue.add("a", item)
    assert [queue.take(cost) for cost in (9, 1, 5)] == ["x", "y", "z"]
    with pytest.raises(LookupError):
        queue.head()


def test_a_flood_of_one_flow_is_passed_by_the_only_item_of_another() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(100):
        queue.add("flood", number)
    for _ in range(10):
        queue.take(cost=LARGEST)
    queue.add("late", -1)
    assert [queue.take(cost=LARGEST) for _ in range(2)] == [-1, 10]


def test_a_flow_earns_nothing_by_waiting_for_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.add("busy", "busy")
        queue.take(cost=LARGEST)
    for _ in range(4):
        queue.add("busy", "busy")
        queue.add("idle", "idle")
    taken = [queue.take(cost=LARGEST) for _ in range(4)]
    assert sorted(taken) == ["busy", "busy", "idle", "idle"]


def test_an_item_that_is_removed_is_not_served() -> None:
    queue: FairQueue[object] = FairQueue()
    first, second = object(), object()
    queue.add("a", first)
    queue.add("a", second)
    queue.remove("a", first)
    assert (queue.head(), len(queue), queue.items()) == (second, 1, [second])
    with pytest.raises(ValueError, match="'a'"):
        queue.remove("a", first)
    with pytest.raises(ValueError, match="'b'"):
        queue.remove("b", second)


def test_work_on_what_was_taken_counts_too() -> None:
    queue: FairQueue[str] = FairQueue()
    for flow in "ab":
        for number in range(3):
            queue.add(flow, f"{flow}{number}")
    assert queue.take(cost=1) == "a0"
    for _ in range(50):
        queue.count("a", 1)
    assert [queue.take(cost=20) for _ in range(5)] == ["b0", "b1", "b2", "a1", "a2"]


def test_a_flow_that_begins_to_wait_is_owed_nothing_for_the_work_on_others() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("busy", "busy")
    queue.take(cost=1)
    for _ in range(1000):
        queue.count("busy", 1)
    for _ in range(4):
        queue.add("idle", "idle")
        queue.add("busy", "busy")
    assert [queue.take(cost=LARGEST) for _ in range(4)] == ["idle", "busy", "idle", "busy"]


AT_A_TIME, LATER = 3, 40
"""Items that are worked on at a time, and what each may cost after it was taken."""

arrivals = st.tuples(st.sampled_from(FLOWS), st.integers(1, LARGEST), st.integers(0, LATER))


@given(st.lists(arrivals | st.none() | st.integers(1, LATER), max_size=120))
def test_while_two_flows_wait_neither_gets_further_ahead_than_stated(
    events: list[tuple[str | None, int, int] | int | None],
) -> None:
    """None takes the next item, a number works so much on each that was taken; the others arrive."""
    queue: FairQueue[tuple[str | None, int, int]] = FairQueue()
    waiting: dict[str | None, int] = dict.fromkeys(FLOWS, 0)
    worked_on: list[tuple[str | None, int]] = []  # with what is left of each
    ahead: dict[tuple[str | None, str | None], int] = {}  # work of one minus that of the other, since both wait

    def worked(flow: str | None, cost: int) -> None:
        for pair in itertools.permutations(FLOWS, 2):
            if waiting[pair[0]] and waiting[pair[1]] and flow in pair:
                ahead[pair] = ahead.get(pair, 0) + (cost if flow == pair[0] else -cost)

    for event in events:
        if isinstance(event, tuple):
            queue.add(event[0], event)
            waiting[event[0]] += 1
        elif isinstance(event, int):
            for flow, left in worked_on:
                queue.count(flow, min(event, left))
                worked(flow, min(event, left))
            worked_on = [(flow, left - event) for flow, left in worked_on if left > event]
        elif len(queue) and len(worked_on) < AT_A_TIME:
            flow, cost, later = queue.head()
            assert queue.take(cost) == (flow, cost, later)
            worked(flow, cost)
            waiting[flow] -= 1
            worked_on.append((flow, later))
        for pair in [pair for pair in ahead if not (waiting[pair[0]] and waiting[pair[1]])]:
            del ahead[pair]
        assert all(abs(lead) <= 2 * (LARGEST + AT_A_TIME * LATER) for lead in ahead.values())
        assert len(queue) == sum(waiting.values())
