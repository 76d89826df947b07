"""Puts the adapters shipped with the demo model into the store, once."""

from importlib import resources
from pathlib import Path

from adapters.store import AdapterStore
from service.log import logger, pairs

_MARKER = "demo-adapters"
"""A file in the store's folder: they came once, and whoever deletes them does not want them back."""


def demo_model_folder() -> Path:
    """The shipped base model."""
    return _artifacts() / "base"


def demo_adapter_folders() -> tuple[Path, ...]:
    """The shipped adapters; a folder's name is the adapter's."""
    return tuple(sorted(path.parent for path in (_artifacts() / "adapters").glob("*/adapter_config.json")))


def _artifacts() -> Path:
    return Path(str(resources.files("adapters"))) / "demo" / "artifacts"


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
