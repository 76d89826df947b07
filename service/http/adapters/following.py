"""Keeping up with a store that other servers change as well."""

import asyncio
from collections.abc import Callable

from anyio import to_thread

from service.http.adapters.registry import AdapterRegistry
from service.log import logger

LOOK_EVERY_S = 1.0
"""How long this server may serve what another one has replaced or deleted, at most, and a look."""


class Following:
    """Looks into the store, now and then or when asked, and serves what it finds there.

    Args:
        registry: of a shared store.
        changed: told each name that leads elsewhere now, or nowhere.
        every_s: seconds between looks.
    """

    def __init__(self, registry: AdapterRegistry, changed: Callable[[str], None], every_s: float = LOOK_EVERY_S) -> None:
        self._registry = registry
        self._changed = changed
        self._every_s = every_s
        self._turn = asyncio.Lock()
        self._begun = 0

    async def run(self) -> None:
        """Look again and again, once the registry is loaded; until cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self.look()
            except Exception:
                # Of a network's file system, which may come back. Nothing is said to have been deleted meanwhile.
                logger.exception("the shared store of adapters can't be read; what was read is served on")

    async def look(self) -> None:
        """Serve what is in the store now. However many ask, one looks: it serves all who asked before it began.

        Raises:
            OSError: the store can't be read.
        """
        if not self._registry.is_loaded:
            return
        begun = self._begun
        async with self._turn:
            if self._begun > begun:
                return
            self._begun += 1
            for name in await to_thread.run_sync(self._registry.catch_up):
                self._changed(name)
