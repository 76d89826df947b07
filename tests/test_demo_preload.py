from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.store.store import AdapterStore
from service.demo import preload
from tests.http_harness import adapter, folder_of


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "store", max_adapters=9, max_total_bytes=10**9) as store:
        yield store


@pytest.fixture
def shipped(tmp_path: Path) -> tuple[Path, ...]:
    return tuple(folder_of(adapter(seed=seed), tmp_path / "shipped" / f"demo-{seed}") for seed in (1, 2))


def names(store: AdapterStore) -> list[str]:
    return [stored.name for stored in store.list()]


def test_the_demos_adapters_come_once_and_stay_deleted(store: AdapterStore, shipped: tuple[Path, ...], tmp_path: Path) -> None:
    assert preload(store, tmp_path / "store", shipped) == 2
    assert names(store) == ["demo-1", "demo-2"]
    store.delete("demo-1")
    assert preload(store, tmp_path / "store", shipped) == 0
    assert names(store) == ["demo-2"]


def test_an_adapter_of_the_users_own_is_not_replaced(store: AdapterStore, shipped: tuple[Path, ...], tmp_path: Path) -> None:
    mine = store.put("demo-1", folder_of(adapter(seed=9), tmp_path / "mine"))
    assert preload(store, tmp_path / "store", shipped) == 1
    assert store.get("demo-1").version == mine.version


def test_a_new_release_renews_what_is_still_ours(store: AdapterStore, shipped: tuple[Path, ...], tmp_path: Path) -> None:
    preload(store, tmp_path / "store", shipped)
    before = store.get("demo-2").version
    store.delete("demo-1")
    newer = tuple(folder_of(adapter(seed=seed), tmp_path / "newer" / f"demo-{seed - 10}") for seed in (11, 12))
    assert preload(store, tmp_path / "store", newer) == 1
    assert names(store) == ["demo-2"]
    assert store.get("demo-2").version != before
    mine = store.put("demo-2", folder_of(adapter(seed=9), tmp_path / "mine"))
    assert preload(store, tmp_path / "store", shipped) == 0
    assert store.get("demo-2").version == mine.version


def test_an_unreadable_record_takes_nothing_from_anybody(
    store: AdapterStore, shipped: tuple[Path, ...], tmp_path: Path
) -> None:
    (tmp_path / "store" / "demo-adapters.json").write_text("[")
    mine = store.put("demo-1", folder_of(adapter(seed=9), tmp_path / "mine"))
    assert preload(store, tmp_path / "store", shipped) == 1
    assert store.get("demo-1").version == mine.version
