"""Names to adapters: keeps the store on disk and the engine in step, and answers which adapter serves a name."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from adapters.adapter import Adapter
from adapters.checkpoint import write_peft
from adapters.errors import AdapterBusy, AdapterError, AdapterNotFound, InvalidAdapter, InvalidName
from adapters.nesting import export_rank
from adapters.quality import QualityProfile
from adapters.store.archive import pack_zip
from adapters.store.store import AdapterStore
from adapters.store.stored import StoredAdapter, check_name
from service.core import EngineProtocol
from service.errors import AdapterUnfit, NameTaken, NotReady, UnknownAdapter
from service.http.adapters.served_adapter import AdapterState, ServedAdapter
from service.keys import ANYONE, ApiKey
from service.rank.rank_policy import RankFacts

UNNAMED = ("dummy", "tgi")
"""What Hugging Face's clients put into `model` where nothing was named."""
RESERVED_NAMES = ("other", *UNNAMED)
"""What no new adapter may be called; "other" is a value of metric labels. The store reserves "base" itself."""


class RegistryObserver(Protocol):
    """Is told what is served. Metrics implements it."""

    def adapter_loaded(self, name: str, quality: QualityProfile | None, seconds: float) -> None:
        """An adapter is served under this name, perhaps instead of another version."""

    def adapter_deleted(self, name: str) -> None:
        """The name is gone."""


class AdapterRegistry:
    """The adapters that requests can name. Reads never wait; writes are made one after another.

    `viewer` is the name of the caller's API key, "" without. To everyone but its owner a private adapter does not exist.

    Two names may hold the same content: the engine keeps a version as long as any name has it. A request in flight
    keeps the version it was submitted with, whatever happens to its name.
    """

    def __init__(self, store: AdapterStore, engine: EngineProtocol, observer: RegistryObserver) -> None:
        self._store = store
        self._engine = engine
        self._observer = observer
        self._served: Mapping[str, ServedAdapter] = MappingProxyType({})
        self._change = threading.Lock()
        self._names_lock = threading.Lock()
        self._writing: set[str] = set()
        self._is_loaded = threading.Event()

    # Reads

    def resolve(self, name: str, viewer: str = "") -> ServedAdapter:
        """The adapter that serves a name now.

        Raises:
            UnknownAdapter: there is none.
            AdapterUnfit: it does not fit the base model.
            NotReady: not found, but the store is still being loaded.
        """
        served = self.get(name, viewer)
        if served.problem is not None:
            raise AdapterUnfit(name, served.problem)
        return served

    def get(self, name: str, viewer: str = "") -> ServedAdapter:
        """The entry of a name, fit or not. Raises UnknownAdapter, or NotReady as `resolve` does."""
        served = self._served.get(name)
        if served is None or not served.is_visible_to(viewer):
            raise UnknownAdapter(name) if self.is_loaded else NotReady()
        return served

    def knows(self, name: str, viewer: str = "") -> bool:
        """Whether the caller may know of an adapter of that name, fit or not."""
        served = self._served.get(name)
        return served is not None and served.is_visible_to(viewer)

    def list(self, viewer: str = "") -> tuple[ServedAdapter, ...]:
        """All entries that the caller may know of, by name."""
        served = self._served
        return tuple(served[name] for name in sorted(served) if served[name].is_visible_to(viewer))

    def counts(self) -> dict[str, int]:
        """Number of adapters by state."""
        found = Counter(served.state for served in self._served.values())
        return {state.value: found[state] for state in AdapterState}

    @property
    def is_loaded(self) -> bool:
        """Everything that was stored at start has been loaded or found unfit."""
        return self._is_loaded.is_set()

    def wait_loaded(self, timeout_s: float) -> bool:
        """Block until `is_loaded`; False if that took too long."""
        return self._is_loaded.wait(timeout_s)

    # Writes

    def load_all(
        self,
        progress: Callable[[ServedAdapter, int, int], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Load everything in the store. An adapter that doesn't fit is kept and listed as unfit.

        Args:
            progress: told of each adapter, how many are done, and of how many.
            should_stop: asked before each; the rest is left where it is.
        """
        names = self._differing()
        for done, name in enumerate(names, start=1):
            if should_stop():
                return
            with self._change:
                self._follow(name)
            if progress is not None and (served := self._served.get(name)) is not None:
                progress(served, done, len(names))
        self._is_loaded.set()

    def catch_up(self) -> Sequence[str]:
        """Serve what other servers of a shared store have put, and no more what they have deleted; the names of these.

        Raises:
            OSError: the store can't be read.
        """
        self._store.refresh()
        names = self._differing()
        for name in names:
            with self._change:
                self._follow(name)
        return names

    @contextmanager
    def writing(self, name: str, caller: ApiKey = ANYONE) -> Iterator[None]:
        """Claim a name for one change, of an upload from its first byte on.

        Raises:
            InvalidName: not a legal name, or a new adapter's and reserved or the base model's.
            UnknownAdapter, NameTaken: as `check_may_change`.
            AdapterBusy: another one is under way.
            NotReady: the store is still being loaded.
        """
        check_name(name)
        if not self.is_loaded:
            raise NotReady
        is_reserved = name in RESERVED_NAMES or name == self._engine.model.name
        with self._names_lock:
            if is_reserved and name not in self._served:  # one that is there already can go
                raise InvalidName(name, "this name is reserved")
            self.check_may_change(name, caller)
            if name in self._writing:
                raise AdapterBusy(name)
            self._writing.add(name)
        try:
            yield
        finally:
            with self._names_lock:
                self._writing.discard(name)

    def check_may_change(self, name: str, caller: ApiKey) -> None:
        """Whether what is there, if anything, may be replaced, deleted or measured anew by a caller.

        Raises:
            UnknownAdapter: it is another's.
            NameTaken: it is shared, and the caller has adapters of its own only.
        """
        served = self._served.get(name)
        if served is None:
            return
        if not served.is_visible_to(caller.name):
            raise UnknownAdapter(name)
        if caller.private_uploads and served.owner is None:
            raise NameTaken(name)

    def put(self, name: str, folder: Path, *, renest: bool = True, caller: ApiKey = ANYONE) -> tuple[ServedAdapter, bool]:
        """Store and serve what lies in a folder; True beside it if the name is new. Call inside `writing`.

        The engine takes the adapter before the store commits: if either refuses, the old version stays in both.

        Args:
            caller: perhaps its owner where the name is new; a name that is there stays whose it is.

        Raises:
            InvalidAdapter: it can't be read, or does not fit the base model.
            StoreFull, AdapterBusy: as AdapterStore.put.
            UnknownAdapter, NameTaken: as `writing`, of what another server has put since.
        """
        with self._change:
            self._catch_up_with(name)
            self.check_may_change(name, caller)
            old = self._served.get(name)
            owner = old.owner if old is not None else caller.name if caller.private_uploads else None
            return self._put(name, folder, renest=renest, owner=owner), old is None

    def _put(self, name: str, folder: Path, *, renest: bool, owner: str | None) -> ServedAdapter:
        taken: list[ServedAdapter] = []
        seconds = 0.0

        def take(stored: StoredAdapter, adapter: Adapter) -> None:
            nonlocal seconds
            started_at = time.perf_counter()
            self._engine.load(stored.version, adapter)
            seconds = time.perf_counter() - started_at
            taken.append(ServedAdapter.ready(stored, adapter, self._engine.model.parameters))

        try:
            stored = self._store.put(name, folder, renest=renest, owner=owner, check=take)
        except BaseException:
            for each in taken:
                self._unload_unless_named(each.version)
            raise
        served = replace(taken[-1], stored=stored)
        self._serve(served)
        self._observer.adapter_loaded(name, stored.quality, seconds)
        return served

    def holds(self, name: str) -> bool:
        """Whether there is an adapter of that name, fit or not. Call inside `writing`, which says if it is another's."""
        return name in self._served

    def set_quality(self, name: str, version: str, profile: QualityProfile) -> ServedAdapter:
        """Give a version another quality profile, which makes it a new one. Call inside `writing`.

        Raises:
            AdapterNotFound: the name does not lead to that version any more.
            StoreFull: the store has no room for both.
            AdapterBusy: as AdapterStore.put.
        """
        with self._change, self._store.new_upload() as folder:
            self._catch_up_with(name)
            served = self._served.get(name)
            if served is None or served.stored is None or served.version != version:
                raise AdapterNotFound(f"{name}@{version}")
            write_peft(replace(self._store.load(served.stored), quality=profile), folder)
            return self._put(name, folder, renest=False, owner=served.owner)

    def delete(self, name: str, caller: ApiKey = ANYONE) -> None:
        """Forget an adapter; requests in flight keep it until they end. Call inside `writing`.

        Raises:
            UnknownAdapter: there is none of that name.
            NameTaken, AdapterBusy: as `writing`, of what another server has put since.
        """
        with self._change:
            self._catch_up_with(name)
            self.check_may_change(name, caller)
            gone = self.get(name, caller.name)
            self._store.delete(name)
            self._forget(gone)

    def new_upload(self) -> AbstractContextManager[Path]:
        """An empty folder for an upload or an export, removed at the end of the block."""
        return self._store.new_upload()

    def export(self, name: str, rank: int | None, scratch: Path, viewer: str = "") -> tuple[Path, int]:
        """Write a zip with a PEFT checkpoint of one rank, the largest if None; its path and rank.

        Args:
            scratch: an empty folder, as `new_upload` gives.

        Raises:
            UnknownAdapter, AdapterUnfit: nothing to export.
            IllegalRank: the adapter does not have this rank.
            StoreFull: the disk is.
        """
        served = self.get(name, viewer)
        if served.stored is None:
            raise AdapterUnfit(name, served.problem or "its files can't be read")
        rank = served.stored.config.r_max if rank is None else rank
        served.stored.config.check_rank(rank)
        target = scratch / "export.zip"
        with self._store.new_upload() as folder:
            export_rank(self._store.load(served.stored), rank, folder)
            pack_zip(folder, target)
        return target, rank

    # The store's adapters, served. Inside `_change`, but for the first.

    def _differing(self) -> Sequence[str]:
        """Names that are served otherwise than the store knows them."""
        stored = {each.name: each for each in self._store.list()}
        broken, served = self._store.broken, self._served
        changed = {name for name, each in stored.items() if name not in served or served[name].stored is not each}
        damaged = {name for name, error in broken.items() if name not in served or served[name].problem != str(error)}
        return sorted(changed | damaged | (served.keys() - stored.keys() - broken.keys()))

    def _catch_up_with(self, name: str) -> None:
        self._store.refresh()
        self._follow(name)

    def _follow(self, name: str) -> None:
        """Serve a name as the store knows it, or no more."""
        served = self._served.get(name)
        try:
            stored = self._store.get(name)
        except AdapterNotFound:
            if served is not None:
                self._forget(served)
            return
        except InvalidAdapter as error:
            owner = self._store.broken_owner(name)
            self._serve(ServedAdapter(name, None, AdapterState.UNFIT, RankFacts(()), str(error), owner))
            return
        if served is None or served.stored is not stored:
            with suppress(AdapterNotFound):  # replaced or deleted since: the next look tells
                self._serve(self._load_stored(stored))

    def _load_stored(self, stored: StoredAdapter) -> ServedAdapter:
        """Raises AdapterNotFound if another server replaced or deleted it meanwhile."""
        started_at = time.perf_counter()
        try:
            adapter = self._store.load(stored)
            self._engine.load(stored.version, adapter)
        except AdapterNotFound:
            raise
        except AdapterError as error:
            facts = RankFacts(stored.config.ranks)
            return ServedAdapter(stored.name, stored, AdapterState.UNFIT, facts, str(error), stored.owner)
        self._observer.adapter_loaded(stored.name, stored.quality, time.perf_counter() - started_at)
        return ServedAdapter.ready(stored, adapter, self._engine.model.parameters)

    def _serve(self, served: ServedAdapter) -> None:
        old = self._served.get(served.name)
        self._served = MappingProxyType({**self._served, served.name: served})
        if old is not None:
            self._unload_unless_named(old.version)

    def _forget(self, served: ServedAdapter) -> None:
        self._served = MappingProxyType({n: s for n, s in self._served.items() if n != served.name})
        self._unload_unless_named(served.version)
        self._observer.adapter_deleted(served.name)

    def _unload_unless_named(self, version: str) -> None:
        named = (s.version for s in self._served.values() if s.state is AdapterState.READY)
        if version not in named:
            self._engine.unload(version)
