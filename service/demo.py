"""Puts the adapters shipped with the demo model into the store, once each."""

import hashlib
from pathlib import Path

from adapters.demo import ARTIFACTS
from adapters.errors import InvalidAdapter
from adapters.json_file import read_json
from adapters.store.files import replace_json
from adapters.store.store import AdapterStore
from service.log import entry, logger

_RECORD = "demo-adapters.json"
"""A file in the store's folder: by adapter, the digest of the files that were shipped and the version they became."""


def demo_model_folder() -> Path:
    """The shipped base model."""
    return ARTIFACTS / "base"


def demo_adapter_folders() -> tuple[Path, ...]:
    """The shipped adapters; a folder's name is the adapter's."""
    return tuple(sorted(path.parent for path in (ARTIFACTS / "adapters").glob("*/adapter_config.json")))


def preload(store: AdapterStore, store_folder: Path, folders: tuple[Path, ...]) -> int:
    """Put the shipped adapters into the store; how many were put.

    Each comes once, and again when a new release ships other files. What its user deleted stays deleted, and what its user
    put under the same name stays.

    Raises:
        AdapterError: one can't be stored.
    """
    record_file = store_folder / _RECORD
    record = _read_record(record_file)
    stored = {each.name: each.version for each in store.list()}
    count = 0
    for folder in folders:
        name, digest = folder.name, _digest(folder)
        known = record.get(name, {})
        # Unknown so far: it comes unless the name is taken. Known: it is renewed if it still is what we put.
        is_ours = stored.get(name) == known.get("version")
        if known.get("shipped") == digest or not is_ours:
            continue
        record[name] = {"shipped": digest, "version": store.put(name, folder).version}
        logger.info(entry("demo adapter stored", adapter=name))
        count += 1
    if count:
        with store.new_upload() as scratch:
            replace_json(record_file, record, scratch)  # perhaps while another server that shares the store does the same
    return count


def _read_record(path: Path) -> dict[str, dict[str, str]]:
    """What was put before; nothing if there is no readable record, and then every name in the store is its user's."""
    try:
        record = read_json(path, max_bytes=1 << 20)
    except InvalidAdapter:
        return {}
    return record if isinstance(record, dict) else {}


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
