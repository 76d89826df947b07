"""A stored adapter as a server has it: whether it can be served, at which ranks, and for whom."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from adapters.adapter import Adapter
from adapters.nesting import energy_per_rank
from adapters.store.stored import StoredAdapter
from service.core import AdapterChoice
from service.errors import AdapterUnfit
from service.rank.quality_curve import energy_prior
from service.rank.rank_policy import RankFacts


class AdapterState(StrEnum):
    """Whether a stored adapter can be served."""

    READY = "ready"
    UNFIT = "unfit"
    """Stored, but it does not fit the base model, or its files no longer read; `problem` says why."""


@dataclass(frozen=True)
class ServedAdapter:
    """A stored adapter and how it stands with this engine.

    Attributes:
        stored: None where its files could not even be described.
        facts: what rank policies need of it.
        bytes_at: legal rank to the bytes of the factors at that rank.
        problem: why it is unfit, None when it is ready.
        owner: name of the API key that alone may see it; None for a shared adapter.
    """

    name: str
    stored: StoredAdapter | None
    state: AdapterState
    facts: RankFacts
    problem: str | None = None
    owner: str | None = None
    bytes_at: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def ready(cls, stored: StoredAdapter, adapter: Adapter, base_parameters: int) -> "ServedAdapter":
        """An adapter that the engine has taken; `base_parameters` are the base model's."""
        ranks = stored.config.ranks
        parameters = {rank: _parameters_at(adapter, rank) for rank in ranks}
        prior = None
        if stored.quality is None and adapter.modules:
            prior = energy_prior(energy_per_rank(adapter).mean, ranks)
        facts = RankFacts(ranks, stored.quality, parameters, base_parameters, prior)
        bytes_at = {rank: _bytes_at(adapter, rank) for rank in ranks}
        return cls(stored.name, stored, AdapterState.READY, facts, owner=stored.owner, bytes_at=bytes_at)

    def is_visible_to(self, viewer: str) -> bool:
        """Whether a caller, by the name of its key, may know of it."""
        return self.owner is None or self.owner == viewer

    @property
    def version(self) -> str:
        """Digest of its content; "" where that is not known."""
        return self.stored.version if self.stored else ""

    def choice(self, rank: int) -> AdapterChoice:
        """What the engine is told.

        Raises:
            AdapterUnfit: there is nothing to serve.
            IllegalRank: the adapter does not have this rank.
        """
        if self.stored is None:
            raise AdapterUnfit(self.name, self.problem or "its files can't be read")
        return AdapterChoice(self.version, rank, self.stored.config.scale(rank))


def _parameters_at(adapter: Adapter, rank: int) -> int:
    """Numbers in the factors that a token meets at a rank: its work, next to the base model's parameters."""
    return sum(min(rank, m.rank) * (m.a.shape[1] + m.b.shape[0]) for m in adapter.modules.values())


def _bytes_at(adapter: Adapter, rank: int) -> int:
    """Bytes of the factors at a rank."""
    return sum(
        min(rank, m.rank) * (m.a.shape[1] * m.a.element_size() + m.b.shape[0] * m.b.element_size())
        for m in adapter.modules.values()
    )
