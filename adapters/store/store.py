"""AdapterStore: adapters by name, each an immutable version named by the digest of its content.

    root/
    ├── lock                    held by the one process that owns the store, or by all that share it
    ├── turn                    held by whoever changes a name or removes a version, for as long as that takes
    ├── versions/<digest>/      adapter_config.json, adapter_model.safetensors, perhaps quality.json; never changed
    ├── names/<name>.json       {"version": digest, "created": UTC time}, perhaps "owner"; replaced atomically
    └── tmp/<random>/           uploads and versions on their way in or out; emptied at start. Those who share a store have
                                a folder each there, which whoever opens the store next removes if they were killed

A version is durable before its name points to it, and leaves after no name does. So whatever moment the process is killed
at, each name leads to its old version or to its new one, whole.
"""

import errno
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError

from adapters.adapter import Adapter
from adapters.checkpoint import describe_peft, read_peft, write_peft
from adapters.config import AdapterKind
from adapters.errors import AdapterBusy, AdapterNotFound, InvalidAdapter, InvalidName, StoreFull
from adapters.limits import CheckpointLimits
from adapters.nesting import renest as renest_adapter
from adapters.store import files, sharing
from adapters.store.stored import (
    LEGAL_NAMES,
    NameRecord,
    StoredAdapter,
    check_name,
    is_digest,
    read_name_file,
    version_folder,
)

__all__ = ["LEGAL_NAMES", "AdapterStore", "StoredAdapter", "check_name"]

# What was accepted once stays readable when limits are lowered, and re-nesting makes half-precision files larger.
_NO_LIMITS = CheckpointLimits(
    max_rank=1 << 31, max_bytes=1 << 62, max_tensors=1 << 31, max_header_bytes=1 << 40, max_config_bytes=1 << 30
)


class AdapterStore:
    """Adapters on disk, of one process or of several that share them, and safe to share between threads.

    It knows the folder as it was at the last `refresh` or change of its own.

    Args:
        root: the store's folder; made if absent.
        max_adapters: limit on the number of names.
        max_total_bytes: limit on the stored files' bytes, each version counted once.
        limits: bounds on each upload.
        is_shared: other processes, perhaps of other machines, may open the folder as well, if they share it too.

    Raises:
        AdapterError: another process owns the folder, or shares it and this one would not.
        OSError: the folder can't be used, or has no locks.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_adapters: int,
        max_total_bytes: int,
        limits: CheckpointLimits | None = None,
        is_shared: bool = False,
    ) -> None:
        self._max_adapters = max_adapters
        self._max_total_bytes = max_total_bytes
        self._limits = limits or CheckpointLimits()
        self._root = root
        self._versions, self._names, self._tmp = root / "versions", root / "names", root / "tmp"
        for folder in (self._versions, self._names, self._tmp):
            folder.mkdir(parents=True, exist_ok=True)
        self._held = ExitStack()
        self._held.enter_context(sharing.lock_folder(root, is_shared=is_shared))
        self._guard = threading.RLock()  # of what follows
        self._stamps: Mapping[str, sharing.Stamp] = {}
        """Of the name files as they were read last, without the broken ones; replaced whole, never changed."""
        self._adapters: dict[str, StoredAdapter] = {}
        self._broken: dict[str, InvalidAdapter] = {}
        self._broken_owners: dict[str, str] = {}
        self._busy: set[str] = set()
        try:
            with self._changing():
                self._scratch = self._cleared_scratch(is_shared)
                self._remove_orphans()
        except BaseException:
            self._held.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder up for another process to own."""
        self._held.close()

    @property
    def limits(self) -> CheckpointLimits:
        """Bounds on each upload."""
        return self._limits

    @property
    def total_bytes(self) -> int:
        """Bytes of the stored files, each version counted once."""
        with self._guard:
            return sum({stored.version: stored.nbytes for stored in self._adapters.values()}.values())

    def list(self) -> tuple[StoredAdapter, ...]:
        """All adapters by name, without those whose files were found damaged; see `broken`."""
        with self._guard:
            return tuple(self._adapters[name] for name in sorted(self._adapters))

    @property
    def broken(self) -> dict[str, InvalidAdapter]:
        """Names whose files could not be read, with the reason. They can be put and deleted."""
        with self._guard:
            return dict(self._broken)

    def broken_owner(self, name: str) -> str | None:
        """Whose a damaged adapter is; None for a shared one, and where the damage is in the record of that."""
        with self._guard:
            return self._broken_owners.get(name)

    def refresh(self) -> None:
        """Take in what other processes have put and deleted; one look at a folder if that is nothing.

        Raises:
            OSError: the folder can't be read.
        """
        if sharing.stamps(self._names) != self._stamps:
            with self._changing():
                pass  # it takes in what changed, in nobody's midst

    def get(self, name: str) -> StoredAdapter:
        """The current version of a name.

        Raises:
            AdapterNotFound: there is none.
            InvalidAdapter: its files are damaged.
        """
        with self._guard:
            if name in self._broken:
                raise self._broken[name]
            if name not in self._adapters:
                raise AdapterNotFound(name)
            return self._adapters[name]

    def load(self, stored: StoredAdapter) -> Adapter:
        """Read a version's tensors, and check them against its digest.

        Raises:
            AdapterNotFound: the version was replaced or deleted meanwhile.
            InvalidAdapter: the files changed since they were stored.
        """
        folder = version_folder(self._versions, stored.version)
        try:
            if files.digest_folder(folder) != stored.version:
                raise InvalidAdapter([f"{stored.name}: the stored files do not match their digest {stored.version}"])
            return read_peft(folder, limits=_NO_LIMITS)
        except (OSError, InvalidAdapter):
            if not folder.is_dir():
                raise AdapterNotFound(f"{stored.name}@{stored.version}") from None
            raise

    @contextmanager
    def new_upload(self) -> Iterator[Path]:
        """An empty folder on the store's file system, removed at the end: where an upload is streamed to before `put`.

        Raises:
            StoreFull: the disk is, also by what the block writes.
        """
        folder = self._scratch / uuid.uuid4().hex
        with _disk_full_as_store_full():
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def put(
        self,
        name: str,
        folder: Path,
        *,
        renest: bool = True,
        owner: str | None = None,
        check: Callable[[StoredAdapter, Adapter], None] | None = None,
    ) -> StoredAdapter:
        """Validate an adapter's folder and make it the current version of a name. What is there already stays until then.

        Equal content under the same name, of the same owner, changes nothing and returns what is there.

        Args:
            name: see `check_name`.
            folder: PEFT's two files, perhaps quality.json; only read.
            renest: rotate a plain LoRA into SVD order, so that it can be served at every rank.
            owner: whose it shall be, kept beside the name; None for a shared adapter. The store itself grants and refuses
                nothing by it.
            check: called with what would be stored, before the name leads to it. What it raises stops the put, and the
                store stays as it was: this is how a server refuses an adapter that does not fit its base model.

        Raises:
            InvalidName: the name is not legal.
            AdapterBusy: another upload of this name is under way, or another process changed the name since the last refresh.
            InvalidAdapter, AdapterTooLarge: see `read_peft`.
            StoreFull: a limit of the store, or the disk, is reached.
        """
        check_name(name)
        with self._writing(name) as before:
            self._check_count(name)
            adapter = read_peft(folder, limits=self._limits)
            if renest and adapter.config.kind is AdapterKind.LORA:
                adapter = renest_adapter(adapter)
            with self.new_upload() as staging:
                write_peft(adapter, staging)
                record = NameRecord(files.digest_folder(staging), datetime.now(UTC), owner)
                stored = self._describe(name, staging, record)
                files.sync_folder(staging)
                if check is not None:
                    check(stored, adapter)
                return self._commit(stored, staging, before)

    def delete(self, name: str) -> None:
        """Forget a name, and remove its version unless another name has the same.

        Raises:
            AdapterNotFound: there is no such name.
            AdapterBusy: an upload of this name is under way, or another process changed the name since the last refresh.
        """
        with self._writing(name) as before, self._changing():
            self._check_unchanged(name, before)
            if name not in self._adapters and name not in self._broken:
                raise AdapterNotFound(name)
            stored = self._adapters.pop(name, None)
            self._forget_broken(name)
            files.remove_file(self._name_file(name))
            self._stamps = {each: stamp for each, stamp in self._stamps.items() if each != name}
            if stored is not None:
                self._discard_unless_used(stored.version)

    @contextmanager
    def _writing(self, name: str) -> Iterator[sharing.Stamp | None]:
        """Claim a name in this process; gives what was there."""
        with self._guard:
            if name in self._busy:
                raise AdapterBusy(name)
            self._busy.add(name)
            before = self._stamps.get(name)
        try:
            yield before
        finally:
            with self._guard:
                self._busy.discard(name)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Let no thread and no process change anything meanwhile, and know what was changed before."""
        with self._guard, sharing.turn(self._root):
            self._take_in()
            yield

    def _check_unchanged(self, name: str, before: sharing.Stamp | None) -> None:
        """Whoever changes a name must have known what it led to: it may have been replaced by its new owner's."""
        if self._stamps.get(name) != before:
            raise AdapterBusy(name)

    def _check_count(self, name: str) -> None:
        with self._guard:
            names = {*self._adapters, *self._broken, name}
            if len(names) > self._max_adapters:
                raise StoreFull(f"the store holds {len(names) - 1} adapters, the limit is {self._max_adapters}")

    def _commit(self, stored: StoredAdapter, staging: Path, before: sharing.Stamp | None) -> StoredAdapter:
        """Move a durable version in and point its name to it."""
        with self._changing():
            old = self._adapters.get(stored.name)
            is_same = old is not None and (old.version, old.owner) == (stored.version, stored.owner)
            if old is not None and is_same and self._is_whole(stored.version):
                return old
            self._check_unchanged(stored.name, before)
            self._check_count(stored.name)
            self._check_bytes(stored)
            target = self._versions / stored.version
            if target.exists() and not self._is_whole(stored.version):
                files.discard_folder(target, self._scratch)
            if not target.exists():
                files.move_folder(staging, target)
            record = NameRecord(stored.version, stored.created, stored.owner)
            files.replace_json(self._name_file(stored.name), record.to_json(), self._scratch)
            self._stamps = {**self._stamps, stored.name: sharing.stamp(self._name_file(stored.name))}
            self._adapters[stored.name] = stored
            self._forget_broken(stored.name)
            if old is not None:
                self._discard_unless_used(old.version)
            return stored

    def _forget_broken(self, name: str) -> None:
        self._broken.pop(name, None)
        self._broken_owners.pop(name, None)

    def _check_bytes(self, stored: StoredAdapter) -> None:
        after = {**self._adapters, stored.name: stored}
        total = sum({item.version: item.nbytes for item in after.values()}.values())
        if total > self._max_total_bytes:
            raise StoreFull(f"the store would hold {total} bytes, the limit is {self._max_total_bytes}")

    def _is_whole(self, version: str) -> bool:
        folder = self._versions / version
        try:
            return folder.is_dir() and files.digest_folder(folder) == version
        except OSError:
            return False

    def _discard_unless_used(self, version: str) -> None:
        folder = self._versions / version
        if folder.is_dir() and all(stored.version != version for stored in self._adapters.values()):
            files.discard_folder(folder, self._scratch)

    def _name_file(self, name: str) -> Path:
        check_name(name)  # no path is ever built from a name that was not
        return self._names / f"{name}.json"

    def _take_in(self) -> None:
        """Read the names that changed since they were read last, and those that could not be read then."""
        now = sharing.stamps(self._names)
        for name in {*now, *self._stamps}:
            if now.get(name) != self._stamps.get(name):
                self._adapters.pop(name, None)
                self._forget_broken(name)
                if name in now:
                    self._read(name)
        self._stamps = {name: stamp for name, stamp in now.items() if name not in self._broken}

    def _read(self, name: str) -> None:
        """Read what a name leads to."""
        try:
            record = read_name_file(self._name_file(name))
            if record.owner is not None:
                self._broken_owners[name] = record.owner  # until its files have been read
            self._adapters[name] = self._describe(name, self._versions / record.version, record)
            self._broken_owners.pop(name, None)
        except InvalidName:
            return  # not ours
        except InvalidAdapter as error:
            self._broken[name] = error

    def _cleared_scratch(self, is_shared: bool) -> Path:
        """A folder for what is on its way, without what killed processes left."""
        if not is_shared:
            files.clear_folder(self._tmp)
            return self._tmp
        scratch, claim = sharing.claim_scratch(self._tmp)
        self._held.enter_context(claim)
        self._held.callback(shutil.rmtree, scratch, ignore_errors=True)
        return scratch

    def _remove_orphans(self) -> None:
        """Remove the versions that no name leads to: a process was killed before it could."""
        if self._broken:
            return  # a damaged name file may be the only pointer to a version
        used = {stored.version for stored in self._adapters.values()}
        for folder in self._versions.iterdir():
            if is_digest(folder.name) and folder.name not in used:
                files.discard_folder(folder, self._scratch)

    def _describe(self, name: str, folder: Path, record: NameRecord) -> StoredAdapter:
        """What is known of a stored folder without reading its tensors."""
        description = describe_peft(folder, limits=_NO_LIMITS)
        return StoredAdapter(
            name=name,
            version=record.version,
            config=description.config,
            targets=tuple(sorted({path.rpartition(".")[2] for path in description.modules})),
            nbytes=files.folder_bytes(folder),
            quality=description.quality,
            created=record.created,
            owner=record.owner,
        )


@contextmanager
def _disk_full_as_store_full() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if _is_disk_full(error):
            raise StoreFull("the disk is full") from error
        raise


def _is_disk_full(error: OSError | SafetensorError) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)  # it has no errno
