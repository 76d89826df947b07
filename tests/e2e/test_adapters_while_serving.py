"""Issue story: adapters come, are replaced and go while requests run, and no request in flight notices."""

import socket
from pathlib import Path

from adapters.checkpoint import read_peft
from adapters.nesting import export_rank, renest
from loadtests.server_process import ServerProcess
from tests.e2e.tiny_server import PROMPT, Client, adapter_files, in_background, stock_tokens, wait_until

LONG = 400
"""Tokens of a request that is still running when the adapter under it changes."""


def test_a_stock_peft_adapter_uploaded_while_requests_run_is_served_at_every_rank(
    client: Client, model_folder: Path, adapter_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    client.put("running", adapter_folders[1]).raise_for_status()
    choices: list[dict[str, object]] = [{}, {"adapter_id": "running", "rank": 2}, {"adapter_id": "running", "rank": 16}]
    alone = [client.text(tokens=40, **choice) for choice in choices]

    with in_background(lambda number: client.text(tokens=40, **choices[number]) == alone[number], len(choices)) as same:
        uploaded = client.put("newcomer", adapter_folders[2])
        assert uploaded.is_success, uploaded.text
        assert uploaded.json()["ranks"] == list(range(1, 17))
        nested = renest(read_peft(adapter_folders[2]))
        for rank in (1, 2, 4, 8, 16):
            export_rank(nested, rank, tmp_path / str(rank))
            expected = stock_tokens(model_folder, tmp_path / str(rank), PROMPT, 12)
            answer = client.generate(adapter_id="newcomer", rank=rank)
            assert [token["id"] for token in answer.json()["details"]["tokens"]] == expected, f"rank {rank}"
            assert answer.headers["x-lora-adapter-version"] == uploaded.json()["version"]
    assert same, "no request ran meanwhile"
    assert all(same), "a request beside the upload changed its answer"

    for name in ("running", "newcomer"):
        client.http.delete(f"/adapters/{name}").raise_for_status()


def test_replacing_an_adapter_in_use_leaves_requests_in_flight_on_the_old_one(
    client: Client, adapter_folders: tuple[Path, ...]
) -> None:
    old = client.put("replaced", adapter_folders[0]).raise_for_status().json()["version"]
    before = client.text(tokens=LONG, adapter_id="replaced", rank=4)

    with client.stream(tokens=LONG, adapter_id="replaced", rank=4) as stream:
        received = [next(stream) for _ in range(5)]
        new = client.put("replaced", adapter_folders[3]).raise_for_status().json()["version"]
        after = client.generate(adapter_id="replaced", rank=4)
        still_running = client.metric("dylora_requests_in_flight", state="running")
        received.extend(stream)

    assert still_running == 1, "the request in flight ended before the adapter was replaced: make it longer"
    assert new != old
    assert received[-1]["generated_text"] == before
    assert received[-1]["details"]["adapter_version"] == old
    assert after.headers["x-lora-adapter-version"] == new
    assert after.json()["generated_text"] != before[: len(after.json()["generated_text"])]
    client.http.delete("/adapters/replaced").raise_for_status()


def test_deleting_an_adapter_in_use_leaves_requests_in_flight_alone(client: Client, adapter_folders: tuple[Path, ...]) -> None:
    client.put("deleted", adapter_folders[0]).raise_for_status()
    before = client.text(tokens=LONG, adapter_id="deleted", rank=16)

    with client.stream(tokens=LONG, adapter_id="deleted", rank=16) as stream:
        received = [next(stream) for _ in range(5)]
        client.http.delete("/adapters/deleted").raise_for_status()
        gone = client.generate(adapter_id="deleted", rank=16)
        still_running = client.metric("dylora_requests_in_flight", state="running")
        received.extend(stream)

    assert still_running == 1, "the request in flight ended before the adapter was deleted: make it longer"
    assert received[-1]["generated_text"] == before
    assert gone.status_code == 404
    assert "deleted" not in client.versions()


def test_an_upload_that_breaks_off_leaves_the_old_version_and_the_name_free(
    server: ServerProcess, client: Client, adapter_folders: tuple[Path, ...]
) -> None:
    scratch = Path(str(server.settings["adapters_dir"])) / "tmp"
    old = client.put("broken-off", adapter_folders[0]).raise_for_status().json()["version"]
    upload = client.http.build_request("PUT", "/adapters/broken-off", files=adapter_files(adapter_folders[1]))
    content = upload.read()
    head = f"PUT /adapters/broken-off HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as line:
        line.sendall(f"{head}content-type: {upload.headers['content-type']}\r\n\r\n".encode() + content[: len(content) // 2])
        wait_until(lambda: any(scratch.iterdir()))
        assert client.put("broken-off", adapter_folders[2]).status_code == 409
    wait_until(lambda: not any(scratch.iterdir()))
    assert client.versions()["broken-off"] == old
    assert client.put("broken-off", adapter_folders[2]).status_code == 200
    client.http.delete("/adapters/broken-off").raise_for_status()
