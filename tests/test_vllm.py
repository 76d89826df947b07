"""vLLM's routes to load and unload adapters, and what they refuse to open."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.checkpoint import TENSORS_FILE
from tests.http_harness import Server, adapter, folder_of, in_process


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The configured folder, with a checkpoint in it and one beside it."""
    root = tmp_path / "loras"
    folder_of(adapter(seed=1), root / "team" / "mine")
    folder_of(adapter(seed=2), tmp_path / "secret")
    return root


@pytest.fixture
def server(root: Path, tmp_path: Path) -> Iterator[Server]:
    with in_process(tmp_path, lora_load_dir=root) as server:
        yield server


def load(server: Server, path: str, name: str = "mine", **fields: Any) -> httpx.Response:
    return server.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


def unload(server: Server, name: str) -> httpx.Response:
    return server.client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_an_adapter_is_loaded_used_and_unloaded(server: Server, root: Path) -> None:
    for path in ("team/mine", str(root / "team" / "mine")):
        response = load(server, path)
        assert response.text == "Success: LoRA adapter 'mine' added successfully."
        assert response.headers["content-type"].startswith("text/plain")
        assert server.generate(adapter_id="mine", rank=2).status_code == 200
        assert unload(server, "mine").text == "Success: LoRA adapter 'mine' removed successfully."
        assert server.generate(adapter_id="mine", rank=2).status_code == 404
    assert (root / "team" / "mine" / TENSORS_FILE).exists()
    assert unload(server, "mine").json()["error"]["code"] == "model_not_found"


def test_a_name_is_replaced_only_where_that_was_asked(server: Server) -> None:
    before = server.store.get("demo").version
    response = load(server, "team/mine", "demo")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "lora_name")
    assert server.store.get("demo").version == before
    assert load(server, "team/mine", "demo", load_inplace=True).status_code == 200
    assert server.store.get("demo").version != before


def test_it_is_off_unless_the_setting_names_a_folder(root: Path, tmp_path: Path) -> None:
    with in_process(tmp_path) as server:
        error = load(server, str(root / "team" / "mine")).json()["error"]
        assert error["param"] == "lora_path"
        assert "DYLORA_LORA_LOAD_DIR" in error["message"]


@pytest.mark.parametrize(
    "path", ["../secret", "team/../../secret", "{outside}", "/etc", ".", "", "nothing", "team/mine\0", "link"]
)
def test_nothing_outside_the_folder_is_opened(server: Server, root: Path, tmp_path: Path, path: str) -> None:
    (root / "link").symlink_to(tmp_path / "secret")
    response = load(server, path.format(outside=tmp_path / "secret"))
    assert response.status_code == 400, response.text
    assert [each.name for each in server.store.list()] == ["demo"]


@pytest.mark.parametrize("make", [os.symlink, lambda _, path: os.mkfifo(path)], ids=["a link", "a pipe"])
def test_a_file_that_is_none_is_not_opened(server: Server, root: Path, tmp_path: Path, make: Any) -> None:
    file = root / "team" / "mine" / TENSORS_FILE
    file.unlink()
    make(tmp_path / "secret" / TENSORS_FILE, file)
    response = load(server, "team/mine")
    assert response.status_code == 400
    assert "is no file that can be read, or a link" in response.json()["error"]["message"]


def test_a_checkpoint_above_the_limit_is_refused(root: Path, tmp_path: Path) -> None:
    with in_process(tmp_path, lora_load_dir=root, max_adapter_bytes=4096) as server:
        (root / "team" / "mine" / TENSORS_FILE).write_bytes(bytes(5000))
        assert load(server, "team/mine").status_code == 413
