"""Puts the adapters shipped with the demo model into the store, once."""

from pathlib import Path

from adapters.demo import ARTIFACTS
from adapters.store import AdapterStore
from service.log import logger, pairs

_MARKER = "demo-adapters"
"""A file in the store's folder: they came once, and whoever deletes them does not want them back."""


def demo_model_folder() -> Path:
    """The shipped base model."""
    return ARTIFACTS / "base"


def demo_adapter_folders() -> tuple[Path, ...]:
    """The shipped adapters; a folder's name is the adapter's."""
    return tuple(sorted(path.parent for path in (ARTIFACTS / "adapters").glob("*/adapter_config.json")))


def preload(store: AdapterStore, store_folder: Path, folders: tuple[Path, ...]) -> int:
    """Put the adapters into the store unless that was done before; how many were put.

    Raises:
        AdapterError: one can't be stored.
    """
    marker = store_folder / _MARKER
    if marker.exists():
        return 0
    taken = {stored.name for stored in store.list()}
    new = [folder for folder in folders if folder.name not in taken]
    for folder in new:
        store.put(folder.name, folder)
        logger.info("%s", "demo adapter stored " + pairs(adapter=folder.name))
    marker.touch()
    return len(new)
