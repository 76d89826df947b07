"""What the routes work with: one object, made by create_app and handed to every request."""

import time
from asyncio import Semaphore
from dataclasses import dataclass, field
from threading import Event

from service.core import EngineProtocol
from service.errors import Draining, EngineDown
from service.http.adapters.calibration import Calibrations
from service.http.adapters.following import Following
from service.http.adapters.registry import AdapterRegistry
from service.http.latencies import Latencies
from service.http.limits import DrainRate
from service.http.metrics import Metrics
from service.http.scrapes import Scrapes
from service.http.shadow import ShadowScorer
from service.http.tenants import Tenants
from service.rank.auto_rank import AutoRank
from service.rank.policies import PolicyBook
from service.settings import Settings

MAX_EXPORTS = 4
"""At a time, from the first byte read to the last one sent: each takes memory, and then disk, of an adapter's size."""


@dataclass(frozen=True)
class Services:
    """The parts of one server."""

    settings: Settings
    engine: EngineProtocol
    registry: AdapterRegistry
    metrics: Metrics
    policies: PolicyBook
    tenants: Tenants
    auto_rank: AutoRank
    shadow: ShadowScorer
    calibrations: Calibrations
    latencies: Latencies
    following: Following | None = None
    """Of a server whose store others change as well."""
    scrapes: Scrapes | None = None
    """Of a server that is one of several behind one address."""
    drain_rate: DrainRate = field(default_factory=DrainRate)
    """How fast generations end, for Retry-After."""
    exports: Semaphore = field(default_factory=lambda: Semaphore(MAX_EXPORTS))
    """Held by an export until its file is sent."""
    started_at: int = field(default_factory=lambda: int(time.time()))
    """Unix time."""
    draining: Event = field(default_factory=Event)
    """Set once the server takes no new work; it never goes back."""

    @property
    def is_ready(self) -> bool:
        """Adapters loaded and not draining."""
        return self.registry.is_loaded and not self.draining.is_set()

    async def find_adapter(self, name: str | None, viewer: str) -> None:
        """Before a name is said to be unknown to a caller: another server may have put it a moment ago.

        What is another's private adapter takes as long as what there is not.
        """
        if self.following is not None and name is not None and not self.registry.knows(name, viewer):
            await self.following.look()

    def check_alive(self) -> None:
        """Raise EngineDown once the engine has failed."""
        if not self.engine.is_alive:
            raise EngineDown

    def check_accepting(self) -> None:
        """Raise Draining once the server takes no new work, or EngineDown."""
        self.check_alive()
        if self.draining.is_set():
            raise Draining
