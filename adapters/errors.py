"""Every error the library raises on purpose.

AdapterError
├── InvalidAdapter        a checkpoint that can't be used; lists every offender
│   └── AdapterTooLarge   … because it exceeds a configured size limit
├── InvalidName           an adapter name outside the legal pattern
├── AdapterNotFound       no adapter of that name
├── AdapterBusy           another upload of the same name is under way
├── StoreFull             the store's limit on adapters or bytes is reached
├── IllegalRank           a rank that the adapter does not have
├── DataError             training or evaluation data that can't be read
└── TrainingError         a training that can't start, or that can't go on
"""

from collections.abc import Sequence


class AdapterError(Exception):
    """Base of the tree. `str(error)` is meant for the person who caused it."""


class InvalidAdapter(AdapterError):
    """A checkpoint that can't be used. `problems` names every offender, not only the first."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


class AdapterTooLarge(InvalidAdapter):
    """The checkpoint exceeds a configured size limit."""


class InvalidName(AdapterError):
    """An adapter name outside the legal pattern."""

    def __init__(self, name: str, legal: str) -> None:
        self.name = name
        super().__init__(f"adapter name {name[:80]!r} is not legal: {legal}")


class AdapterNotFound(AdapterError):
    """No adapter of that name (or version) is known."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"no adapter named {name[:80]!r}")


class AdapterBusy(AdapterError):
    """Another upload of the same name is under way."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"adapter {name!r} is being written by another upload; try again when it has ended")


class StoreFull(AdapterError):
    """The store's limit on the number of adapters or on their bytes is reached."""


class IllegalRank(AdapterError):
    """A rank that the adapter does not have. `legal` lists those it has."""

    def __init__(self, rank: int, legal: Sequence[int]) -> None:
        self.rank = rank
        self.legal = tuple(legal)
        super().__init__(f"rank {rank} is not a rank of this adapter; legal ranks: {', '.join(map(str, self.legal))}")


class DataError(AdapterError):
    """Training or evaluation data that can't be read."""


class TrainingError(AdapterError):
    """A training that can't start (settings, model or output folder are no good), or that can't go on."""
