"""Issue story: a real server's log can be read by a machine, tells of every request once, and of no text and no key."""

import json
from pathlib import Path
from typing import Any

import httpx

from loadtests.server_process import ServerProcess
from tests.documents import SERVICE
from tests.e2e.tiny_server import SMALL, Client, body
from tests.http_keys import make_key, write_keys

SECRET = "sesame"
"""Said in every request. The log must not have it."""


def test_every_request_has_one_line_of_json_without_its_text(
    model_folder: Path, adapter_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    key, stranger = make_key("alice"), make_key("mallory")
    settings: dict[str, Any] = {
        **SMALL,
        "model": model_folder,
        "adapters_dir": tmp_path / "adapters",
        "api_keys_file": write_keys(tmp_path / "keys.json", key),
        "log_level": "debug",
        "log_format": "json",
    }
    log = tmp_path / "log"
    with ServerProcess(settings, log) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        answers: list[httpx.Response] = []

        def ask(method: str, path: str, token: str | None = key.token, **options: Any) -> None:
            headers = {"X-Request-Id": f"ask-{len(answers)}", **({"Authorization": f"Bearer {token}"} if token else {})}
            answers.append(http.request(method, path, headers=headers, **options))

        said = f"open {SECRET}"
        ask("POST", "/generate", json=body(said, 8, {}))
        ask("POST", "/generate_stream", json=body(said, 8, {}))
        ask("POST", "/generate", json=body(said, 8, {"stop": [SECRET], "best_of": 2}))
        ask("POST", "/generate", json=body(said, 8, {"temperature": SECRET}))
        ask("POST", "/generate", json=body(said, 8, {"adapter_id": "nobody"}))
        ask("POST", "/generate", content=f'{{"inputs": "{SECRET}'.encode())
        ask("POST", "/generate", token=stranger.token, json=body(said, 8, {}))
        ask("POST", "/generate", token=None, json=body(said, 8, {}))
        ask("GET", f"/adapters/hers/export?rank={SECRET}")
        ask("GET", "/metrics")
        headers = {"X-Request-Id": "upload", **key.headers}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as uploading:
            Client(uploading).put("hers", adapter_folders[0])
    text = log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    ids = [line["request_id"] for line in lines if "request_id" in line and line.get("path") != "/ready"]
    assert sorted(ids) == sorted([*(f"ask-{number}" for number in range(len(answers))), "upload"])
    assert {answer.status_code for answer in answers} == {200, 401, 404, 422}
    fields = {name for line in lines if line["message"] in ("request", "answered") for name in line}
    assert [name for name in fields - {"time", "level", "message"} if f"`{name}`" not in SERVICE] == []
    assert SECRET not in text
    assert answers[0].json()["generated_text"] not in text
    assert not [each.name for each in (key, stranger) if each.token in text or each.token[8:] in text]
