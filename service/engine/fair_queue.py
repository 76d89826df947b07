"""Who is admitted next: fair across flows, in order of arrival within one."""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass
class _Line(Generic[Item]):
    """The waiting items of one flow, and how much work it was given so far."""

    given: int
    items: deque[tuple[int, Item]] = field(default_factory=deque)  # with their numbers of arrival


class FairQueue(Generic[Item]):
    """The flow that was given the least work goes next: start-time fair queuing (Goyal, Vin and Cheng, SIGCOMM 1996), which
    the Virtual Token Counter (Sheng et al., OSDI 2024) brought to language models.

    A flow that begins to wait starts at the level of the one served last: it is owed nothing for the time when it asked
    for nothing. With L the largest cost of an item, that bounds what can happen, whatever arrives: while two flows both
    wait, the work given to one is at most 2 L more than that given to the other. So the first item of a flow waits for at
    most 2 L of each other flow, and for a single item of each if its own flow has no lead.
    """

    def __init__(self) -> None:
        self._lines: dict[Hashable, _Line[Item]] = {}
        self._level = 0
        self._arrivals = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, flow: Hashable, item: Item) -> None:
        """Put an item at the end of its flow's line."""
        line = self._lines.setdefault(flow, _Line(self._level))
        if not line.items:
            line.given = max(line.given, self._level)
        self._arrivals += 1
        line.items.append((self._arrivals, item))
        self._length += 1

    def head(self) -> Item:
        """The item that goes next; among equals the one that came first.

        Raises:
            LookupError: nothing waits.
        """
        return self._lines[self._next()].items[0][1]

    def take(self, cost: int) -> Item:
        """Remove the item that goes next and count its work.

        Raises:
            LookupError: nothing waits.
        """
        flow = self._next()
        line = self._lines[flow]
        _, item = line.items.popleft()
        self._length -= 1
        self._level = line.given
        line.given += cost
        self._forget_idle()
        return item

    def remove(self, flow: Hashable, item: Item) -> None:
        """Remove an item, wherever it stands.

        Raises:
            ValueError: it does not wait.
        """
        line = self._lines.get(flow)
        number = next((number for number, each in line.items if each is item), None) if line is not None else None
        if line is None or number is None:
            raise ValueError(f"nothing of {flow!r} to remove")
        line.items.remove((number, item))
        self._length -= 1
        self._forget_idle()

    def items(self) -> list[Item]:
        """All that waits, in order of arrival."""
        return [item for _, item in sorted(chain(*(line.items for line in self._lines.values())), key=lambda each: each[0])]

    def _next(self) -> Hashable:
        waiting = [(line.given, line.items[0][0], flow) for flow, line in self._lines.items() if line.items]
        if not waiting:
            raise LookupError("nothing waits")
        return min(waiting, key=lambda each: each[:2])[2]

    def _forget_idle(self) -> None:
        """Flows without items and without a lead are as good as new ones."""
        for flow in [flow for flow, line in self._lines.items() if not line.items and line.given <= self._level]:
            del self._lines[flow]
