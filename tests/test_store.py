"""AdapterStore: what was acknowledged is there, whole, whenever the process is killed and whoever asks."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from adapters.adapter import Adapter
from adapters.checkpoint import TENSORS_FILE, CheckpointLimits, read_peft, write_peft
from adapters.config import AdapterKind
from adapters.errors import AdapterBusy, AdapterError, AdapterNotFound, InvalidAdapter, InvalidName, StoreFull
from adapters.nesting import renest
from adapters.quality import Metric, QualityProfile
from adapters.store.store import AdapterStore, check_name
from tests.checkpoints import random_adapter

ROOT = Path(__file__).parents[1]


def upload(folder: Path, seed: int = 0, kind: AdapterKind = AdapterKind.LORA, r: int = 2) -> Path:
    """A small adapter's folder."""
    write_peft(random_adapter(kind, seed=seed, r=r), folder)
    return folder


def open_store(root: Path, **settings: int) -> AdapterStore:
    return AdapterStore(root, **{"max_adapters": 4, "max_total_bytes": 1 << 30, **settings})  # type: ignore[arg-type]


def same(one: Adapter, other: Adapter) -> bool:
    return one.config == other.config and all(
        torch.equal(m.a, other.modules[path].a) and torch.equal(m.b, other.modules[path].b) for path, m in one.modules.items()
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_a_full_store(tmp_path: Path, error: Exception) -> None:
    with open_store(tmp_path / "s") as store:
        with pytest.raises(StoreFull), store.new_upload():
            Path("/dev/full").write_bytes(b"x")
        with pytest.raises(StoreFull, match="the disk is full"), store.new_upload():
            raise error
        with pytest.raises(FileNotFoundError), store.new_upload() as folder:
            (folder / "nothing").read_bytes()
        assert not list((tmp_path / "s" / "tmp").iterdir())


def test_what_is_put_is_listed_and_loaded_also_by_the_next_process(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    source = upload(tmp_path / "u")
    with open_store(tmp_path / "s") as store:
        stored = store.put("a", source)
        assert store.list() == (stored,)
        assert store.get("a") == stored
        assert same(store.load(stored), renest(read_peft(source)))
        assert before <= stored.created <= datetime.now(UTC)
        assert stored.created.utcoffset() == timedelta(0)
        assert stored.targets == ("q_proj", "v_proj")
        assert stored.nbytes == store.total_bytes > 0
    with open_store(tmp_path / "s") as store:
        assert store.list() == (stored,)
        assert same(store.load(store.get("a")), renest(read_peft(source)))


def test_an_owner_is_kept_beside_the_name(tmp_path: Path) -> None:
    source = upload(tmp_path / "u")
    with open_store(tmp_path / "s") as store:
        shared = store.put("a", source)
        owned = store.put("b", source, owner="alice")
        assert (shared.owner, owned.owner, shared.version) == (None, "alice", owned.version)
        assert store.put("b", source).owner is None  # equal content, but another owner
        store.put("b", source, owner="alice")
    with open_store(tmp_path / "s") as store:
        assert [each.owner for each in store.list()] == [None, "alice"]
    (tmp_path / "s" / "versions" / owned.version / "adapter_config.json").unlink()
    with open_store(tmp_path / "s") as store:
        assert set(store.broken) == {"a", "b"}
        assert (store.broken_owner("a"), store.broken_owner("b")) == (None, "alice")
        store.delete("b")
        assert store.broken_owner("b") is None


@pytest.mark.parametrize("owner", ['""', "5", "[]"])
def test_a_record_whose_owner_is_none_is_damaged(tmp_path: Path, owner: str) -> None:
    with open_store(tmp_path / "s") as store:
        store.put("a", upload(tmp_path / "u"), owner="alice")
    record = tmp_path / "s" / "names" / "a.json"
    record.write_text(record.read_text().replace('"alice"', owner))
    with open_store(tmp_path / "s") as store:
        assert set(store.broken) == {"a"}


@pytest.mark.parametrize(
    ("kind", "renest_it", "expected"),
    [
        (AdapterKind.LORA, True, AdapterKind.RENESTED),
        (AdapterKind.LORA, False, AdapterKind.LORA),
        (AdapterKind.DYLORA, True, AdapterKind.DYLORA),
        (AdapterKind.RENESTED, True, AdapterKind.RENESTED),
    ],
)
def test_only_a_plain_lora_is_renested(tmp_path: Path, kind: AdapterKind, renest_it: bool, expected: AdapterKind) -> None:
    with open_store(tmp_path / "s") as store:
        stored = store.put("a", upload(tmp_path / "u", kind=kind), renest=renest_it)
        assert stored.config.kind is expected
        if kind is expected:
            assert same(store.load(stored), read_peft(tmp_path / "u"))


def test_equal_content_changes_nothing_and_other_content_makes_a_new_version(tmp_path: Path) -> None:
    one, two = upload(tmp_path / "1", seed=1), upload(tmp_path / "2", seed=2)
    with open_store(tmp_path / "s") as store:
        first = store.put("a", one)
        assert store.put("a", one) == first
        second = store.put("a", two)
        assert second.version != first.version
        assert store.get("a") == second
        assert [path.name for path in (tmp_path / "s" / "versions").iterdir()] == [second.version]
        with pytest.raises(AdapterNotFound):
            store.load(first)


def test_names_share_a_version_until_the_last_one_goes(tmp_path: Path) -> None:
    source = upload(tmp_path / "u")
    with open_store(tmp_path / "s") as store:
        one, two = store.put("one", source), store.put("two", source)
        assert one.version == two.version
        assert store.total_bytes == one.nbytes
        store.delete("one")
        assert store.list() == (two,)
        store.load(two)
        store.delete("two")
        assert list((tmp_path / "s" / "versions").iterdir()) == []
        with pytest.raises(AdapterNotFound):
            store.delete("two")
        with pytest.raises(AdapterNotFound):
            store.get("two")
    with open_store(tmp_path / "s") as store:
        assert store.list() == ()


def test_quality_is_part_of_the_version(tmp_path: Path) -> None:
    profile = QualityProfile((Metric("f1", True, {1: 0.5}),), "dev")
    adapter = random_adapter(AdapterKind.DYLORA)
    write_peft(adapter, tmp_path / "1")
    write_peft(replace(adapter, quality=profile), tmp_path / "2")
    with open_store(tmp_path / "s") as store:
        plain, measured = store.put("1", tmp_path / "1"), store.put("2", tmp_path / "2")
        assert plain.version != measured.version
    with open_store(tmp_path / "s") as store:
        assert store.get("2").quality == profile
        assert store.load(store.get("2")).quality == profile


@pytest.mark.parametrize(
    "name",
    ["", "base", ".", "..", "a/b", "/a", "a\\b", "-a", ".a", "_a", "a..b", "a@4", "a b", "a\n", "a\0", "é", "x" * 65],
)
def test_a_name_that_could_be_more_than_a_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidName, match="a letter or digit, then up to 63"):
        check_name(name)
    with open_store(tmp_path / "s") as store:
        with pytest.raises(InvalidName):
            store.put(name, tmp_path)
        for method in (store.get, store.delete):
            with pytest.raises(AdapterNotFound):
                method(name)


@pytest.mark.parametrize("name", ["a", "0", "A-b_c.d", "x" * 64, "base2", "Base"])
def test_ordinary_names_are_legal(name: str) -> None:
    check_name(name)


def test_a_made_up_version_is_not_found(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        stored = store.put("a", upload(tmp_path / "u"))
        for version in ("../names", "0" * 64, stored.version.upper()):
            with pytest.raises(AdapterNotFound):
                store.load(replace(stored, version=version))


def test_an_invalid_upload_leaves_the_old_version(tmp_path: Path) -> None:
    with open_store(tmp_path / "s", max_adapters=1) as store:
        stored = store.put("a", upload(tmp_path / "u"))
        bad = upload(tmp_path / "bad", seed=2)
        (bad / TENSORS_FILE).write_bytes(b"no")
        with pytest.raises(InvalidAdapter):
            store.put("a", bad)
        assert store.get("a") == stored
        assert list((tmp_path / "s" / "tmp").iterdir()) == []


def test_limits_of_count_bytes_and_rank(tmp_path: Path) -> None:
    one, two = upload(tmp_path / "1", seed=1), upload(tmp_path / "2", seed=2)
    with open_store(tmp_path / "s", max_adapters=1) as store:
        first = store.put("a", one)
        with pytest.raises(StoreFull, match="the limit is 1"):
            store.put("b", two)
        store.put("a", two)  # a replacement is not one more
    with open_store(tmp_path / "t", max_total_bytes=first.nbytes + 10) as store:
        store.put("a", one)
        with pytest.raises(StoreFull, match=f"the limit is {first.nbytes + 10}"):
            store.put("b", two)
        store.put("b", one)  # the same version takes no more room
        assert [stored.name for stored in store.list()] == ["a", "b"]
    with (
        AdapterStore(tmp_path / "r", max_adapters=1, max_total_bytes=1 << 30, limits=CheckpointLimits(max_rank=1)) as store,
        pytest.raises(InvalidAdapter, match="rank 2, the limit is 1"),
    ):
        store.put("a", one)


def test_lower_limits_do_not_lose_what_was_accepted(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        stored = store.put("a", upload(tmp_path / "u"))
    with AdapterStore(tmp_path / "s", max_adapters=1, max_total_bytes=1, limits=CheckpointLimits(max_rank=1)) as store:
        assert store.list() == (stored,)
        store.load(stored)


def test_one_process_at_a_time_owns_the_folder(tmp_path: Path) -> None:
    with open_store(tmp_path / "s"), pytest.raises(AdapterError, match="in use by another process"):
        open_store(tmp_path / "s")
    open_store(tmp_path / "s").close()


def test_opening_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        stored = store.put("a", upload(tmp_path / "u"))
    orphan, half = tmp_path / "s" / "versions" / ("0" * 64), tmp_path / "s" / "tmp" / "upload"
    upload(orphan, seed=3)
    upload(half, seed=4)
    (tmp_path / "s" / "tmp" / "name.json").write_text("{")
    with open_store(tmp_path / "s") as store:
        assert store.list() == (stored,)
        assert not orphan.exists()
        assert list((tmp_path / "s" / "tmp").iterdir()) == []


def test_changed_files_are_noticed_at_load(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        stored = store.put("a", upload(tmp_path / "u"))
        path = tmp_path / "s" / "versions" / stored.version / TENSORS_FILE
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(bytes(raw))
        with pytest.raises(InvalidAdapter, match="do not match their digest"):
            store.load(stored)
        repaired = store.put("a", tmp_path / "u")  # the same content mends it
        assert repaired.version == stored.version
        store.load(repaired)


@pytest.mark.parametrize("damage", ["{", "{}", '{"version": "../..", "created": "2026-01-01"}', '{"version": 3}'])
def test_a_damaged_name_is_reported_and_nothing_is_removed(tmp_path: Path, damage: str) -> None:
    with open_store(tmp_path / "s") as store:
        good, bad = store.put("good", upload(tmp_path / "1", seed=1)), store.put("bad", upload(tmp_path / "2", seed=2))
    (tmp_path / "s" / "names" / "bad.json").write_text(damage)
    with open_store(tmp_path / "s") as store:
        assert store.list() == (good,)
        assert list(store.broken) == ["bad"]
        with pytest.raises(InvalidAdapter, match=r"bad\.json"):
            store.get("bad")
        assert (tmp_path / "s" / "versions" / bad.version).is_dir()
        assert store.put("bad", tmp_path / "2").version == bad.version
        assert store.broken == {}
    with open_store(tmp_path / "s") as store:
        assert [stored.version for stored in store.list()] == [bad.version, good.version]


def test_a_damaged_name_can_be_deleted(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        store.put("bad", upload(tmp_path / "u"))
    (tmp_path / "s" / "names" / "bad.json").write_text("")
    with open_store(tmp_path / "s") as store:
        store.delete("bad")
    with open_store(tmp_path / "s") as store:
        assert (store.list(), store.broken) == ((), {})
        assert list((tmp_path / "s" / "versions").iterdir()) == []


def test_an_upload_folder_lies_in_the_store_and_goes_away(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        with store.new_upload() as folder, store.new_upload() as other:
            assert folder != other
            upload(folder)
            stored = store.put("a", folder)
        assert not folder.exists()
        store.load(stored)


def test_a_second_upload_of_a_name_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    """The first put is held by a pipe that stands for its quality.json."""
    slow = upload(tmp_path / "slow")
    os.mkfifo(slow / "quality.json")
    outcome: list[object] = []
    with open_store(tmp_path / "s") as store:

        def put() -> None:
            try:
                outcome.append(store.put("a", slow))
            except AdapterError as error:
                outcome.append(error)

        thread = threading.Thread(target=put)
        thread.start()
        with (slow / "quality.json").open("wb") as pipe:  # opens once the put reads it
            with pytest.raises(AdapterBusy):
                store.put("a", upload(tmp_path / "u"))
            with pytest.raises(AdapterBusy):
                store.delete("a")
            store.put("b", tmp_path / "u")  # other names are free
            pipe.write(b"not json")
        thread.join()
        assert isinstance(outcome[0], InvalidAdapter)
        store.put("a", tmp_path / "u")  # and so is this one again


def change_at_once(stores: Sequence[AdapterStore], sources: Sequence[Path], times: int) -> None:
    """Put, load and delete a few names at random, a thread for each of `stores`; refused is only what others are doing."""
    failures: list[BaseException] = []

    def work(store: AdapterStore, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(times):
            name = rng.choice("abc")
            try:
                store.refresh()
                match rng.randrange(4):
                    case 0:
                        store.delete(name)
                    case 1:
                        store.load(store.get(name))
                    case _:
                        store.put(name, rng.choice(sources))
            except (AdapterBusy, AdapterNotFound):
                continue
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(store, seed)) for seed, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_threads_share_a_store(tmp_path: Path) -> None:
    sources = [upload(tmp_path / str(seed), seed=seed) for seed in range(4)]
    with open_store(tmp_path / "s") as store:
        change_at_once([store] * 4, sources, times=15)
        listed = store.list()
        for stored in listed:
            store.load(stored)
        assert {path.name for path in (tmp_path / "s" / "versions").iterdir()} == {stored.version for stored in listed}
    with open_store(tmp_path / "s") as store:
        assert store.list() == listed


class Killer:
    """The process of tests/store_worker.py, seen from here."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def order(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def heard(self) -> tuple[str, str]:
        assert self.process.stdout is not None
        word, _, rest = self.process.stdout.readline().strip().partition(" ")
        assert word, "the worker ended"
        return word, rest


@contextmanager
def killer(root: Path, uploads: list[Path], *, is_shared: bool = False) -> Iterator[Killer]:
    command = [sys.executable, "-m", "tests.store_worker", str(root), *map(str, uploads), *["--shared"] * is_shared]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        worker = Killer(process)
        try:
            assert worker.heard() == ("ready", "")
            yield worker
        finally:
            process.kill()


def test_killed_before_any_change_of_the_file_system_a_put_is_done_or_not_begun(tmp_path: Path) -> None:
    uploads = [upload(tmp_path / str(seed), seed=seed) for seed in range(2)]
    with open_store(tmp_path / "s") as store:
        new = store.put("a", uploads[1]).version
        old = store.put("a", uploads[0]).version
    seen: list[str] = []
    with killer(tmp_path / "s", uploads) as worker:
        for nth in range(1, 1000):
            worker.order(str(nth))
            acknowledged = False
            while (heard := worker.heard())[0] != "end":
                acknowledged = acknowledged or heard == ("ack", new)
            was_killed = int(heard[1]) == signal.SIGKILL
            with open_store(tmp_path / "s") as store:
                version = store.get("a").version
                seen.append(version)
                store.load(store.get("a"))
                assert version == new or (version == old and not acknowledged)
                assert store.broken == {}
                assert [path.name for path in (tmp_path / "s" / "versions").iterdir()] == [version]
                store.put("a", uploads[0])
            if not was_killed:
                break
    assert not was_killed, "the put never came to its end"
    assert seen.count(old) > 5  # killed early
    assert seen.count(new) > 1  # killed late, and not at all
    assert seen == sorted(seen, key=[old, new].index)


def _kill_at_random_moments(tmp_path: Path, times: int) -> None:
    uploads = [upload(tmp_path / str(seed), seed=seed) for seed in range(2)]
    with open_store(tmp_path / "s") as store:
        versions = [store.put("a", source).version for source in uploads]
    rng = random.Random(0)
    with killer(tmp_path / "s", uploads) as worker:
        for _ in range(times):
            worker.order("loop")
            pid, latest, acknowledged = 0, "", 0
            patience = rng.randint(1, 3)
            while not pid or acknowledged < patience:
                word, rest = worker.heard()
                if word == "pid":
                    pid = int(rest)
                elif word == "ack":
                    acknowledged, latest = acknowledged + 1, rest
            sum(range(rng.randrange(400_000)))  # some work, so that the kill lands anywhere in the puts that follow
            os.kill(pid, signal.SIGKILL)
            while (heard := worker.heard())[0] != "end":
                if heard[0] == "ack":
                    latest = heard[1]
            with open_store(tmp_path / "s") as store:
                found = store.get("a")
                store.load(found)
                following = versions[1 - versions.index(latest)]
                assert found.version in (latest, following)
                assert store.broken == {}


def test_killed_at_random_moments_the_last_acknowledged_version_or_the_next_is_there(tmp_path: Path) -> None:
    _kill_at_random_moments(tmp_path, times=8)


@pytest.mark.slow
def test_killed_at_random_moments_many_times(tmp_path: Path) -> None:
    _kill_at_random_moments(tmp_path, times=50)
