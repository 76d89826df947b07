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
    """The flow that was given the least work goes next: the Virtual Token Counter (Sheng et al., OSDI 2024), which brought
    start-time fair queuing (Goyal, Vin and Cheng, SIGCOMM 1996) to language models. What an item costs is counted in part
    when it is taken, the rest while it is worked on.

    A flow that begins to wait starts at least at the level: what those who wait were given at least, or while nobody waits
    the flow that was served last. It is owed nothing for the time when it asked for nothing. With L the largest cost of a
    take, and M the most that is still to be counted of the items of one flow that are worked on at a time, that bounds what
    can happen, whatever arrives: while two flows both wait, the work given to one is at most 2 (L + M) more than that given
    to the other. So the first item of a flow waits for at most that much of each other flow, and for a single item of each
    if its own flow has no lead.
    """

    def __init__(self) -> None:
        self._lines: dict[Hashable, _Line[Item]] = {}
        self._served: _Line[Item] = _Line(0)
        self._level = 0
        self._arrivals = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, flow: Hashable, item: Item) -> None:
        """Put an item at the end of its flow's line."""
        self._raise_level()
        line = self._lines.setdefault(flow, _Line(self._level))
        if not line.items:
            line.given = max(line.given, self._level)
        self._arrivals += 1
        line.items.append((self._arrivals, item))
        self._length += 1

    def head(self) -> Item:
        """The item that goes next; among equals one of another flow than was served last, then the one that came first.

        Raises:
            LookupError: nothing waits.
        """
        return self._lines[self._next()].items[0][1]

    def take(self, cost: int) -> Item:
        """Remove the item that goes next and count what is known of its work.

        Raises:
            LookupError: nothing waits.
        """
        flow = self._next()
        line = self._lines[flow]
        _, item = line.items.popleft()
        self._length -= 1
        self._level = max(self._level, line.given)
        self._served = line
        line.given += cost
        self._forget_idle()
        return item

    def count(self, flow: Hashable, cost: int) -> None:
        """Count more of the work of a flow's items that were taken."""
        self._lines.setdefault(flow, _Line(self._level)).given += cost

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
        waiting = [flow for flow, line in self._lines.items() if line.items]
        if not waiting:
            raise LookupError("nothing waits")
        return min(waiting, key=lambda flow: self._order(self._lines[flow]))

    def _order(self, line: _Line[Item]) -> tuple[int, bool, int]:
        return line.given, line is self._served, line.items[0][0]

    def _raise_level(self) -> None:
        waiting = [line.given for line in self._lines.values() if line.items]
        self._level = max(self._level, min(waiting, default=self._served.given))

    def _forget_idle(self) -> None:
        """Flows without items and without a lead are as good as new ones, but for the one that may set the level."""
        for flow, line in list(self._lines.items()):
            if not line.items and line.given <= self._level and line is not self._served:
                del self._lines[flow]
