import asyncio
import io
import json
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import torch
from starlette.types import ASGIApp, Message

from adapters.checkpoint import CONFIG_FILE, TENSORS_FILE, read_peft
from adapters.config import AdapterKind
from adapters.nesting import at_rank
from service.core import EngineStats
from service.http.services import MAX_EXPORTS
from tests.checkpoints import plain_config, plain_tensors, write_folder
from tests.e2e.tiny_server import wait_until
from tests.http_harness import Server, adapter, files_of, folder_of, in_process, on_socket, zip_of


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with in_process(tmp_path, max_adapters=4) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(adapter(seed=7), tmp_path / "upload")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "plain", plain_config(), plain_tensors())


def test_the_list_shows_what_the_interface_promises(server: Server) -> None:
    (entry,) = server.client.get("/adapters").json()
    stored = server.store.get("demo")
    assert entry == {
        "id": "demo",
        "version": stored.version,
        "kind": "dylora",
        "ranks": [1, 2, 3, 4],
        "r_max": 4,
        "alpha": stored.config.alpha,
        "targets": list(stored.targets),
        "bytes": stored.nbytes,
        "private": False,
        "state": "ready",
        "problem": None,
        "quality": {
            "metric": "bleu",
            "higher_is_better": True,
            "values": {"1": 40.0, "2": 59.0, "3": 59.8, "4": 60.0},
            "source": "a made-up set",
        },
    }
    assert server.client.get("/adapters/demo").json() == entry


def test_an_upload_is_created_served_replaced_and_deleted(server: Server, folder: Path, tmp_path: Path) -> None:
    created = server.client.put("/adapters/mine", files=files_of(folder))
    assert created.status_code == 201, created.text
    assert created.json()["quality"]["metric"] == "bleu"
    assert server.client.get("/adapters/mine").json() == created.json()
    before = server.generate(adapter_id="mine", rank=1)
    assert before.headers["x-lora-adapter-version"] == created.json()["version"]

    other = folder_of(adapter(seed=8), tmp_path / "other")
    replaced = server.client.put("/adapters/mine", files=files_of(other))
    assert replaced.status_code == 200
    after = server.generate(adapter_id="mine", rank=1)
    assert after.headers["x-lora-adapter-version"] == replaced.json()["version"] != created.json()["version"]
    assert after.json() != before.json()
    assert created.json()["version"] not in server.engine.loaded

    assert server.client.delete("/adapters/mine").status_code == 204
    assert server.client.get("/adapters/mine").status_code == 404
    assert server.client.delete("/adapters/mine").status_code == 404
    assert server.generate(adapter_id="mine").status_code == 404
    assert replaced.json()["version"] not in server.engine.loaded


UPLOADS: dict[str, Callable[[Server, Path], httpx.Response]] = {
    "parts by curl's short names": lambda s, f: s.client.put("/adapters/x", files=files_of(f)),
    "parts by the files' names": lambda s, f: s.client.put(
        "/adapters/x", files={name: (f"/some/where/{name}", (f / name).read_bytes()) for name in (CONFIG_FILE, TENSORS_FILE)}
    ),
    "a zip as the body": lambda s, f: s.client.put(
        "/adapters/x", content=zip_of(f), headers={"Content-Type": "application/zip"}
    ),
    "a zip as a part": lambda s, f: s.client.put("/adapters/x", files={"file": ("adapter.zip", zip_of(f))}),
}


@pytest.mark.parametrize("upload", UPLOADS.values(), ids=UPLOADS.keys())
def test_all_ways_to_upload_give_the_same_adapter(
    server: Server, plain: Path, upload: Callable[[Server, Path], httpx.Response]
) -> None:
    response = upload(server, plain)
    assert response.status_code == 201, response.text
    assert (response.json()["kind"], response.json()["ranks"]) == ("renested", [1, 2, 3])
    again = server.client.put("/adapters/y", files=files_of(plain))
    assert again.json()["version"] == response.json()["version"]


def test_renest_false_keeps_a_plain_lora_at_its_one_rank(server: Server, plain: Path) -> None:
    by_query = server.client.put("/adapters/q", params={"renest": "false"}, files=files_of(plain))
    by_form = server.client.put("/adapters/f", files=files_of(plain), data={"renest": "false"})
    assert by_query.json()["kind"] == by_form.json()["kind"] == "lora"
    assert by_query.json()["ranks"] == by_form.json()["ranks"] == [3]
    both = server.client.put("/adapters/b", params={"renest": "true"}, files=files_of(plain), data={"renest": "false"})
    assert (both.status_code, "contradicts" in both.json()["error"]) == (422, True)


def test_an_export_computes_what_the_adapter_does_at_that_rank(server: Server, tmp_path: Path) -> None:
    response = server.client.get("/adapters/demo/export", params={"rank": 2})
    assert response.headers["content-type"] == "application/zip"
    assert 'filename="demo-rank2.zip"' in response.headers["content-disposition"]
    zipfile.ZipFile(io.BytesIO(response.content)).extractall(tmp_path / "export")
    exported, expected = read_peft(tmp_path / "export"), at_rank(server.store.load(server.store.get("demo")), 2)
    for path, module in expected.modules.items():
        found = exported.modules[path]
        torch.testing.assert_close(found.b @ found.a, module.b @ module.a)
    assert server.client.get("/adapters/demo/export").headers["content-disposition"].endswith('rank4.zip"')
    assert server.client.get("/adapters/demo/export", params={"rank": 9}).status_code == 422
    assert server.client.get("/adapters/nobody/export").status_code == 404
    assert not list((tmp_path / "store" / "tmp").iterdir())


def test_few_exports_are_held_at_a_time_and_clients_that_go_away_make_room(tmp_path: Path) -> None:
    """Clients that read nothing until they go away."""
    held: list[int] = []
    gone = asyncio.Semaphore(0)
    scope = {"type": "http", "method": "GET", "path": "/adapters/demo/export", "query_string": b"", "headers": []}

    async def export(app: ASGIApp) -> None:
        messages = [{"type": "http.request"}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await gone.acquire()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                held.append(len(list(tmp_path.glob("store/tmp/*/export.zip"))))
                await asyncio.Event().wait()

        await app(dict(scope), receive, send)

    with in_process(tmp_path) as server:
        portal = server.client.portal  # type: ignore[attr-defined]
        exports = [portal.start_task_soon(export, server.client.app) for _ in range(2 * MAX_EXPORTS)]  # type: ignore[attr-defined]
        for count in (MAX_EXPORTS, 2 * MAX_EXPORTS):
            wait_until(lambda count=count: len(held) == count)  # type: ignore[misc]
            for _ in range(MAX_EXPORTS):
                portal.call(gone.release)
        for each in exports:
            each.result(10)
        assert max(held) == MAX_EXPORTS
        assert not list((tmp_path / "store" / "tmp").iterdir())
        assert server.client.get("/adapters/demo/export").status_code == 200


def multipart(*parts: tuple[str, str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [(name, (filename, content)) for name, filename, content in parts]


CONFIG = json.dumps(plain_config()).encode()
BAD_UPLOADS: list[tuple[str, dict[str, object], int, str]] = [
    ("json", {"json": {}}, 415, "application/json"),
    ("no content type", {"content": b"x"}, 415, "content type ''"),
    ("text", {"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, "send multipart/form-data"),
    ("no boundary", {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 422, "without a boundary"),
    (
        "not multipart",
        {"content": b"hello", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
        422,
        "not well-formed multipart",
    ),
    (
        "cut short",
        {
            "content": b'--b\r\nContent-Disposition: form-data; name="config"\r\n\r\n{}',
            "headers": {"Content-Type": "multipart/form-data; boundary=b"},
        },
        422,
        "ends before its closing boundary",
    ),
    ("not a zip", {"content": b"hello", "headers": {"Content-Type": "application/zip"}}, 422, "not a zip"),
    ("unknown part", {"files": multipart(("thing", "thing.bin", b"x"))}, 422, "unknown part 'thing.bin'; legal:"),
    ("path as a part", {"files": multipart(("x", "../../etc/passwd", b"x"))}, 422, "unknown part 'passwd'"),
    ("sent twice", {"files": multipart(("config", "a", CONFIG), ("config", "b", CONFIG))}, 422, "sent twice"),
    ("no tensors", {"files": multipart(("config", "c", CONFIG))}, 422, TENSORS_FILE),
    ("bad renest", {"files": multipart(("config", "c", CONFIG)), "data": {"renest": "maybe"}}, 422, "renest: 'maybe'"),
    ("bad tensors", {"files": multipart(("config", "c", CONFIG), ("model", "m", b"x"))}, 422, TENSORS_FILE),
    ("large config", {"files": multipart(("config", "c", b" " * 1_100_000))}, 413, "larger than the limit"),
    ("large tensors", {"files": multipart(("model", "m", b" " * 1_100_000))}, 413, "larger than the limit of 1048576"),
    ("zip and file", {"files": multipart(("archive", "a", b"x"), ("config", "c", CONFIG))}, 422, "one or the other"),
]


@pytest.mark.parametrize(("options", "status", "said"), [case[1:] for case in BAD_UPLOADS], ids=[c[0] for c in BAD_UPLOADS])
def test_a_bad_upload_is_told_what_is_wrong_and_changes_nothing(
    tmp_path: Path, options: dict[str, object], status: int, said: str
) -> None:
    with in_process(tmp_path, max_adapter_bytes="1MiB") as server:
        before = server.client.get("/adapters").json()
        for name in ("demo", "new"):
            response = server.client.put(f"/adapters/{name}", **options)  # type: ignore[arg-type]
            assert response.status_code == status, response.text
            assert said in response.json()["error"]
        assert server.client.get("/adapters").json() == before
        assert server.generate(adapter_id="demo", rank=4).status_code == 200
        assert not list((tmp_path / "store" / "tmp").iterdir())


@pytest.mark.parametrize("name", ["other", "base", ".hidden", "a b", "a@8", "x" * 65, "..%2Fx", "%00"])
def test_a_bad_name_is_refused(server: Server, folder: Path, name: str) -> None:
    response = server.client.put(f"/adapters/{name}", files=files_of(folder))
    assert response.status_code in (404, 422)  # a slash makes it another route
    assert len(server.client.get("/adapters").json()) == 1


def test_a_full_store_says_so(tmp_path: Path, folder: Path) -> None:
    with in_process(tmp_path, max_adapters=1) as server:
        response = server.client.put("/adapters/second", files=files_of(folder))
        assert (response.status_code, response.json()["error_type"]) == (507, "store_full")
        assert "the limit is 1" in response.json()["error"]
        assert server.client.put("/adapters/demo", files=files_of(folder)).status_code == 200


def test_what_the_engine_refuses_is_not_stored(server: Server, folder: Path) -> None:
    old = server.store.get("demo").version
    server.engine.refuse_adapters = "model.layers.9 is not in the base model"
    for name in ("demo", "new"):
        response = server.client.put(f"/adapters/{name}", files=files_of(folder))
        assert (response.status_code, response.json()["error"]) == (422, server.engine.refuse_adapters)
    assert [(each.name, each.version) for each in server.store.list()] == [("demo", old)]
    assert server.generate(adapter_id="demo").headers["x-lora-adapter-version"] == old


def test_an_adapter_that_no_longer_fits_is_listed_and_refused_with_the_reason(tmp_path: Path) -> None:
    with in_process(tmp_path) as server:
        engine = server.engine
    engine = type(engine)()
    engine.refuse_adapters = "it has 12 columns, the base model 64"
    with in_process(tmp_path, engine=engine, stored={}) as server:
        (entry,) = server.client.get("/adapters").json()
        assert (entry["id"], entry["state"], entry["problem"]) == ("demo", "unfit", engine.refuse_adapters)
        response = server.generate(adapter_id="demo", rank=1)
        assert (response.status_code, engine.refuse_adapters in response.json()["error"]) == (422, True)
        assert server.client.get("/ready").status_code == 200
        assert server.client.delete("/adapters/demo").status_code == 204


def test_a_damaged_adapter_is_listed_and_can_be_replaced(tmp_path: Path, folder: Path) -> None:
    with in_process(tmp_path) as server:
        version = server.store.get("demo").version
    (tmp_path / "store" / "versions" / version / CONFIG_FILE).write_text("{")
    with in_process(tmp_path, stored={}) as server:
        (entry,) = server.client.get("/adapters").json()
        assert (entry["id"], entry["state"], entry["version"]) == ("demo", "unfit", None)
        assert server.generate(adapter_id="demo").status_code == 422
        assert server.client.get("/adapters/demo/export").status_code == 422
        assert server.client.put("/adapters/demo", files=files_of(folder)).status_code == 200
        assert server.generate(adapter_id="demo").status_code == 200


def test_two_names_of_one_content_are_independent(server: Server, folder: Path) -> None:
    versions = {server.client.put(f"/adapters/{name}", files=files_of(folder)).json()["version"] for name in ("a", "b")}
    assert len(versions) == 1
    assert server.client.delete("/adapters/a").status_code == 204
    assert server.generate(adapter_id="b", rank=2).status_code == 200
    assert server.client.delete("/adapters/b").status_code == 204
    assert not versions & set(server.engine.loaded)


def test_replacing_and_deleting_do_not_disturb_requests_in_flight(tmp_path: Path, folder: Path) -> None:
    def has_requests(count: int) -> Callable[[EngineStats], bool]:
        return lambda stats: stats.running + stats.waiting == count

    with on_socket(tmp_path) as (server, _):
        alone = server.generate(adapter_id="demo", rank=2).json()
        answers: list[httpx.Response] = []
        with server.engine.paused():
            thread = threading.Thread(target=lambda: answers.append(server.generate(adapter_id="demo", rank=2)))
            thread.start()
            assert server.engine.wait_until(has_requests(1))
            assert server.client.put("/adapters/demo", files=files_of(folder)).status_code == 200
            assert server.client.delete("/adapters/demo").status_code == 204
        thread.join(10)
        assert answers[0].json() == alone
        assert server.generate(adapter_id="demo").status_code == 404


@contextmanager
def half_uploaded(server: Server, root: Path, folder: Path, name: str = "slow") -> Iterator[Callable[[], httpx.Response]]:
    """An upload that the server is reading; a call sends the rest and waits for the answer."""
    is_begun, may_end = threading.Event(), threading.Event()
    request = server.client.build_request("PUT", f"/adapters/{name}", files=files_of(folder))
    content = request.read()

    def slowly() -> Iterator[bytes]:
        yield content[:10]
        is_begun.set()
        assert may_end.wait(20)
        yield content[10:]

    headers = {"Content-Type": request.headers["content-type"]}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.client.put, f"/adapters/{name}", content=slowly(), headers=headers)
        assert is_begun.wait(20)
        while not list((root / "store" / "tmp").iterdir()):  # its folder: the server has claimed the name
            server.client.get("/health")

        def rest() -> httpx.Response:
            may_end.set()
            return answer.result(20)

        try:
            yield rest
        finally:
            may_end.set()


def test_the_second_of_two_uploads_of_a_name_is_409(tmp_path: Path, folder: Path) -> None:
    with on_socket(tmp_path) as (server, _), half_uploaded(server, tmp_path, folder, "demo") as rest:
        second = server.client.put("/adapters/demo", files=files_of(folder))
        deleted = server.client.delete("/adapters/demo")
        other = server.client.put("/adapters/other-name", files=files_of(folder))
        assert (second.status_code, deleted.status_code, other.status_code) == (409, 409, 201)
        assert second.json()["error_type"] == "adapter_busy"
        assert rest().status_code == 200


def test_an_upload_that_breaks_off_leaves_the_old_version(tmp_path: Path, folder: Path) -> None:
    with on_socket(tmp_path) as (server, _):
        before = server.client.get("/adapters").json()
        request = server.client.build_request("PUT", "/adapters/demo", files=files_of(folder))
        content = request.read()

        def broken() -> Iterator[bytes]:
            yield content[:100]
            raise ConnectionError("the client dies")

        with pytest.raises(ConnectionError):
            server.client.put("/adapters/demo", content=broken(), headers={"Content-Type": request.headers["content-type"]})
        # Busy until the server has noticed.
        while (response := server.client.put("/adapters/demo", content=b"")).status_code == 409:
            pass
        assert response.status_code == 415
        assert server.client.get("/adapters").json() == before


def test_kinds_can_be_told_apart(server: Server, tmp_path: Path) -> None:
    for kind in AdapterKind:
        folder = folder_of(adapter(kind, quality=None), tmp_path / kind)
        response = server.client.put(f"/adapters/{kind}", params={"renest": "false"}, files=files_of(folder))
        assert response.json()["kind"] == kind


def test_a_query_parameter_that_there_is_not_is_refused(server: Server) -> None:
    response = server.client.get("/adapters/demo/export", params={"ranks": 2})
    assert (response.status_code, response.json()["error"]) == (422, "ranks: no such query parameter; legal: rank")
    response = server.client.delete("/adapters/demo", params={"force": 1})
    assert (response.status_code, response.json()["error"]) == (422, "force: no such query parameter; there are none here")
    assert server.client.get("/adapters/demo").status_code == 200


def test_an_upload_has_all_the_time_of_a_drain(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.server._CLOSE_CONNECTIONS_S", 0.01)
    with on_socket(tmp_path) as (server, draining), half_uploaded(server, tmp_path, folder) as rest:
        draining.handle_exit(signal.SIGTERM, None)
        while any(each.is_serving() for each in draining.servers):
            pass
        assert rest().status_code == 201
    assert draining.all_ended


def test_an_upload_that_outlasts_the_drain_is_told_so(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.server._CLOSE_CONNECTIONS_S", 0.01)
    with on_socket(tmp_path, drain_timeout_s=0) as (server, draining), half_uploaded(server, tmp_path, folder) as rest:
        draining.handle_exit(signal.SIGTERM, None)
        while draining.all_ended:
            pass
        with suppress(httpx.WriteError):
            cut_off = rest()
            assert (cut_off.status_code, cut_off.json()["error_type"]) == (503, "unavailable")
