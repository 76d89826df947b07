"""AdapterStore over one folder for several processes: each sees what the others did, and none undoes it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from adapters.checkpoint import CONFIG_FILE, TENSORS_FILE
from adapters.errors import AdapterBusy, AdapterError, AdapterNotFound, InvalidAdapter, StoreFull
from adapters.store.store import AdapterStore
from tests.test_store import ROOT, change_at_once, killer, upload


def share(root: Path, *, max_adapters: int = 4, max_total_bytes: int = 1 << 30) -> AdapterStore:
    return AdapterStore(root, max_adapters=max_adapters, max_total_bytes=max_total_bytes, is_shared=True)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[AdapterStore, AdapterStore]]:
    """Two that share a folder, as two processes do: a lock is the opened file's."""
    with ExitStack() as stack:
        yield stack.enter_context(share(tmp_path / "s")), stack.enter_context(share(tmp_path / "s"))


def test_what_one_puts_and_deletes_the_other_sees_at_its_next_look(
    pair: tuple[AdapterStore, AdapterStore], tmp_path: Path
) -> None:
    one, other = pair
    first = one.put("a", upload(tmp_path / "1", seed=1), owner="alice")
    assert other.list() == ()
    other.refresh()
    assert other.list() == (first,)
    other.load(first)
    known = other.get("a")
    other.refresh()
    assert other.get("a") is known, "what has not changed is not read again"
    second = one.put("a", upload(tmp_path / "2", seed=2), owner="alice")
    other.refresh()
    assert other.get("a") == second
    one.delete("a")
    other.refresh()
    assert other.list() == ()
    with pytest.raises(AdapterNotFound):
        other.load(second)


def test_what_is_loaded_while_the_other_replaces_it_is_not_found_rather_than_damaged(
    pair: tuple[AdapterStore, AdapterStore], tmp_path: Path
) -> None:
    one, other = pair
    one.put("a", upload(tmp_path / "1", seed=1))
    other.refresh()
    stale = other.get("a")
    one.put("a", upload(tmp_path / "2", seed=2))
    with pytest.raises(AdapterNotFound):
        other.load(stale)


def test_nobody_replaces_or_deletes_what_it_has_not_seen(pair: tuple[AdapterStore, AdapterStore], tmp_path: Path) -> None:
    one, other = pair
    mine, theirs = upload(tmp_path / "1", seed=1), upload(tmp_path / "2", seed=2)
    stored = one.put("a", mine, owner="alice")
    with pytest.raises(AdapterBusy):
        other.put("a", theirs, owner="bob")
    assert other.get("a") == stored, "by now it has"
    assert one.put("b", mine) == other.put("b", mine), "the same for the same owner is no conflict"
    one.put("b", theirs)
    with pytest.raises(AdapterBusy):
        other.delete("b")
    other.delete("b")
    with pytest.raises(AdapterBusy):
        one.delete("b")
    with pytest.raises(AdapterNotFound):
        one.delete("b")


def test_limits_count_what_all_have_put(tmp_path: Path) -> None:
    sources = [upload(tmp_path / str(seed), seed=seed) for seed in range(2)]
    with share(tmp_path / "s", max_adapters=1) as one, share(tmp_path / "s", max_adapters=1) as other:
        stored = one.put("a", sources[0])
        with pytest.raises(StoreFull, match="the limit is 1"):
            other.put("b", sources[1])
    most = stored.nbytes + 10
    with share(tmp_path / "t", max_total_bytes=most) as one, share(tmp_path / "t", max_total_bytes=most) as other:
        one.put("a", sources[0])
        with pytest.raises(StoreFull, match=f"the limit is {most}"):
            other.put("b", sources[1])


def test_a_version_stays_as_long_as_a_name_of_anybodys_leads_to_it(
    pair: tuple[AdapterStore, AdapterStore], tmp_path: Path
) -> None:
    one, other = pair
    source = upload(tmp_path / "u")
    one.put("a", source)
    shared = other.put("b", source)
    one.delete("a")
    other.load(shared)


def test_damage_is_seen_and_mended_by_all(pair: tuple[AdapterStore, AdapterStore], tmp_path: Path) -> None:
    one, other = pair
    stored = one.put("a", upload(tmp_path / "u"))
    other.refresh()
    damaged = tmp_path / "s" / "names" / "a.json"
    (tmp_path / "half").write_text("{")
    (tmp_path / "half").rename(damaged)
    for store in pair:
        store.refresh()
        assert (store.list(), list(store.broken)) == ((), ["a"])
        with pytest.raises(InvalidAdapter, match=r"a\.json"):
            store.get("a")
    assert one.put("a", tmp_path / "u").version == stored.version
    other.refresh()
    assert other.broken == {}
    other.load(other.get("a"))


def test_what_could_not_be_read_for_a_moment_is_read_again(pair: tuple[AdapterStore, AdapterStore], tmp_path: Path) -> None:
    """As a network's file system may have it."""
    one, other = pair
    stored = one.put("a", upload(tmp_path / "u"), owner="alice")
    config = tmp_path / "s" / "versions" / stored.version / CONFIG_FILE
    config.rename(tmp_path / "away")
    other.refresh()
    assert (list(other.broken), other.broken_owner("a")) == (["a"], "alice")
    (tmp_path / "away").rename(config)
    other.refresh()
    assert (other.get("a"), other.broken) == (stored, {})


def test_a_folder_has_one_owner_or_many_that_share_it(tmp_path: Path) -> None:
    root = tmp_path / "s"

    def own() -> AdapterStore:
        return AdapterStore(root, max_adapters=4, max_total_bytes=1 << 30)

    with share(root), pytest.raises(AdapterError, match="in use by another process"):
        own()
    with own(), pytest.raises(AdapterError, match="in use by another process, which does not share it"):
        share(root)
    own().close()
    assert list((root / "tmp").iterdir()) == []


def test_who_joins_removes_what_the_killed_left_and_nothing_of_the_living(tmp_path: Path) -> None:
    """One process is killed amid an upload; another goes on with its own."""
    root, source = tmp_path / "s", upload(tmp_path / "u")
    program = (
        "import os, signal, sys; from pathlib import Path; from tests.test_store_shared import share\n"
        "with share(Path(sys.argv[1])) as store, store.new_upload() as folder:\n"
        "    (folder / 'part').write_bytes(b'x'); print(folder, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    with share(root) as living, living.new_upload() as mine:
        (mine / TENSORS_FILE).write_bytes(b"x")
        stored = living.put("a", source)
        orphan = upload(root / "versions" / ("0" * 64), seed=3)
        killed = subprocess.run(
            [sys.executable, "-c", program, str(root)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert not orphan.exists(), killed.stderr
        left = Path(killed.stdout.strip())
        assert left.exists()
        with share(root) as joined:
            assert joined.list() == (stored,)
            assert not left.exists()
            assert (mine / TENSORS_FILE).exists()
            joined.load(stored)
    assert list((root / "tmp").iterdir()) == []


def test_a_put_that_is_killed_is_done_or_not_begun_and_the_living_go_on(tmp_path: Path) -> None:
    """One process is killed before each of its changes of the file system; another, which lives on, is asked after each."""
    uploads = [upload(tmp_path / str(seed), seed=seed) for seed in range(2)]
    with share(tmp_path / "s") as living, killer(tmp_path / "s", uploads, is_shared=True) as worker:
        new = living.put("a", uploads[1]).version
        old = living.put("a", uploads[0]).version
        seen: list[str] = []
        for nth in range(1, 1000):
            worker.order(str(nth))
            acknowledged = False
            while (heard := worker.heard())[0] != "end":
                acknowledged = acknowledged or heard == ("ack", new)
            living.refresh()
            seen.append(living.get("a").version)
            living.load(living.get("a"))
            assert living.broken == {}
            assert seen[-1] == new or (seen[-1] == old and not acknowledged)
            assert living.put("a", uploads[0]).version == old
            if int(heard[1]) != signal.SIGKILL:
                break
        assert (seen.count(old) > 5, seen[-1], seen) == (True, new, sorted(seen, key=[old, new].index))
        with share(tmp_path / "s"):  # whoever joins clears what the killed left
            assert [path.name for path in (tmp_path / "s" / "versions").iterdir()] == [old]
            assert len(list((tmp_path / "s" / "tmp").iterdir())) == 2


def test_several_change_a_store_at_once_and_agree_in_the_end(tmp_path: Path) -> None:
    sources = [upload(tmp_path / str(seed), seed=seed) for seed in range(4)]
    with ExitStack() as stack:
        stores = [stack.enter_context(share(tmp_path / "s")) for _ in range(3)]
        change_at_once(stores * 2, sources, times=25)
        for store in stores:
            store.refresh()
            assert store.list() == stores[0].list()
        for stored in stores[0].list():
            stores[0].load(stored)
        versions = {path.name for path in (tmp_path / "s" / "versions").iterdir()}
        assert versions == {stored.version for stored in stores[0].list()}
