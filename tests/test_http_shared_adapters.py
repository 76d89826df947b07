"""Two servers over one store: what a client does through one of them, the other answers for."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.errors import AdapterNotFound
from service.core import Usage
from service.errors import UnknownAdapter
from service.http.adapters.following import Following
from service.keys import ApiKey, Scope
from tests.e2e.tiny_server import wait_until
from tests.http_harness import PROFILE, Server, adapter, files_of, folder_of, in_process
from tests.http_keys import make_key, write_keys

Pair = tuple[Server, Server]
ALICE, BOB = (make_key(name, private_uploads=True) for name in ("alice", "bob"))


def two(root: Path, stack: ExitStack, **settings: Any) -> Pair:
    first = stack.enter_context(in_process(root, adapters_shared=True, **settings))
    return first, stack.enter_context(in_process(root, adapters_shared=True, stored={}, **settings))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield two(tmp_path, stack, lora_load_dir=tmp_path)


@pytest.fixture
def uploads(tmp_path: Path) -> list[Path]:
    return [folder_of(adapter(seed=seed), tmp_path / f"upload-{seed}") for seed in (7, 8)]


def put(server: Server, name: str, folder: Path, **options: dict[str, str]) -> str:
    answer = server.client.put(f"/adapters/{name}", files=files_of(folder), **options)  # type: ignore[arg-type]
    assert answer.status_code in (200, 201), answer.text
    return str(answer.json()["version"])


def test_a_name_that_one_server_takes_is_known_to_the_other_at_once(pair: Pair, uploads: list[Path]) -> None:
    one, other = pair
    routes: dict[str, Callable[[str], httpx.Response]] = {
        "generated": lambda name: other.generate(adapter_id=name, rank=2),
        "named in a header": lambda name: other.generate(headers={"X-LoRA-Adapter": f"{name}@2"}),
        "under /v1": lambda name: other.client.post("/v1/completions", json={"model": f"{name}@2", "prompt": "x"}),
        "told": lambda name: other.client.get(f"/adapters/{name}"),
        "told under /v1": lambda name: other.client.get(f"/v1/models/{name}@2"),
        "exported": lambda name: other.client.get(f"/adapters/{name}/export"),
        "measured": lambda name: other.client.post(f"/adapters/{name}/calibration", json={"examples": ["xyz"]}),
    }
    for number, (what, ask) in enumerate(routes.items()):
        put(one, f"mine-{number}", uploads[0])
        assert ask(f"mine-{number}").is_success, what
    put(one, "loaded", uploads[0])
    again = {"lora_name": "loaded", "lora_path": uploads[1].name}
    assert "is loaded already" in other.client.post("/v1/load_lora_adapter", json=again).text
    put(one, "unloaded", uploads[0])
    assert other.client.post("/v1/unload_lora_adapter", json={"lora_name": "unloaded"}).status_code == 200
    unknown = other.generate(adapter_id="nobody")
    assert (unknown.status_code, unknown.json()["error_type"]) == (404, "adapter_not_found")


def test_what_is_replaced_or_deleted_goes_within_a_look(pair: Pair, uploads: list[Path]) -> None:
    one, other = pair
    old = put(one, "mine", uploads[0])
    assert other.generate(adapter_id="mine").headers["x-lora-adapter-version"] == old
    other.services.latencies.add("mine", 4, Usage(1, 2, queue_s=0.0, time_to_first_token_s=0.1, total_s=0.2))
    new = put(one, "mine", uploads[1])
    wait_until(lambda: other.generate(adapter_id="mine").headers["x-lora-adapter-version"] == new)
    assert other.services.latencies.of("mine", 4).requests == 0, "they were the old version's"
    assert one.client.delete("/adapters/mine").status_code == 204
    wait_until(lambda: other.generate(adapter_id="mine").status_code == 404)
    assert [each["id"] for each in other.client.get("/adapters").json()] == ["demo"]
    assert set(other.engine.loaded) == {other.store.get("demo").version}


def test_a_private_adapter_is_its_owners_on_every_server(tmp_path: Path, uploads: list[Path]) -> None:
    with ExitStack() as stack:
        one, other = two(tmp_path, stack, api_keys_file=write_keys(tmp_path / "keys.json", ALICE, BOB))
        mine = put(one, "secret", uploads[0], headers=ALICE.headers)
        taken = other.client.put("/adapters/secret", files=files_of(uploads[1]), headers=BOB.headers)
        assert (taken.status_code, other.generate(adapter_id="secret", headers=BOB.headers).status_code) == (404, 404)
        answer = other.generate(adapter_id="secret", headers=ALICE.headers)
        assert answer.headers["x-lora-adapter-version"] == mine


def test_who_began_to_upload_before_it_heard_of_the_owner_is_refused(pair: Pair, uploads: list[Path]) -> None:
    one, other = pair
    alice, bob = (ApiKey(name, frozenset(Scope), private_uploads=True) for name in ("alice", "bob"))
    theirs = other.services.registry
    with theirs.writing("secret", bob):
        stored, is_new = one.services.registry.put("secret", uploads[0], caller=alice)
        assert (is_new, stored.owner) == (True, "alice")
        with pytest.raises(UnknownAdapter):
            theirs.put("secret", uploads[1], caller=bob)
        with pytest.raises(UnknownAdapter):
            theirs.delete("secret", bob)
    assert theirs.get("secret", "alice").version == stored.version


def test_what_was_measured_of_one_version_is_not_said_of_another(pair: Pair, uploads: list[Path]) -> None:
    one, other = pair
    old, new = put(one, "mine", uploads[0]), put(one, "mine", uploads[1])
    put(one, "same", uploads[0])  # so that the old version's files are still there
    with pytest.raises(AdapterNotFound):
        other.services.registry.set_quality("mine", old, PROFILE)
    assert other.services.registry.set_quality("mine", new, PROFILE).version == new, "the same profile: the same content"


def test_however_many_ask_each_sees_what_was_there_when_it_asked(pair: Pair, uploads: list[Path]) -> None:
    one, other = pair
    registry, changed = other.services.registry, list[str]()
    following = Following(registry, changed.append)

    async def ask() -> None:
        for number in range(3):
            put(one, f"mine-{number}", uploads[0])
            await asyncio.gather(*(following.look() for _ in range(8)))
            registry.resolve(f"mine-{number}")

    asyncio.run(ask())
    assert len(changed) == len(set(changed))


def test_a_folder_that_can_not_be_read_is_looked_at_again(
    pair: Pair, uploads: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = pair
    put(one, "mine", uploads[0])
    names, away = tmp_path / "store" / "names", tmp_path / "away"

    async def follow() -> None:
        changed = asyncio.Event()
        following = Following(other.services.registry, lambda name: changed.set(), every_s=0.001)
        running = asyncio.create_task(following.run())
        async with asyncio.timeout(10):
            names.rename(away)
            while "can't be read" not in caplog.text:
                await asyncio.sleep(0.001)
            away.rename(names)
            put(one, "late", uploads[0])
            while not other.services.registry.holds("late"):
                await asyncio.sleep(0.001)
        running.cancel()

    other.generate(adapter_id="mine")
    asyncio.run(follow())
    assert other.generate(adapter_id="mine").status_code == 200
