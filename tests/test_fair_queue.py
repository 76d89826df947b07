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


arrivals = st.tuples(st.sampled_from(FLOWS), st.integers(1, LARGEST))


@given(st.lists(arrivals | st.none(), max_size=120))
def test_while_two_flows_wait_neither_gets_more_than_two_items_ahead(events: list[tuple[str | None, int] | None]) -> None:
    """None takes the next item; the others arrive."""
    queue: FairQueue[tuple[str | None, int]] = FairQueue()
    waiting: dict[str | None, int] = dict.fromkeys(FLOWS, 0)
    ahead: dict[tuple[str | None, str | None], int] = {}  # work of one minus that of the other, since both wait
    for event in events:
        if event is not None:
            queue.add(event[0], event)
            waiting[event[0]] += 1
        elif len(queue):
            flow, cost = queue.head()
            assert queue.take(cost) == (flow, cost)
            for pair in itertools.permutations(FLOWS, 2):
                if waiting[pair[0]] and waiting[pair[1]] and flow in pair:
                    ahead[pair] = ahead.get(pair, 0) + (cost if flow == pair[0] else -cost)
            waiting[flow] -= 1
        ahead = {pair: lead for pair, lead in ahead.items() if waiting[pair[0]] and waiting[pair[1]]}
        assert all(abs(lead) <= 2 * LARGEST for lead in ahead.values())
        assert len(queue) == sum(waiting.values())
