"""Issue story: a table of bad uploads and bad requests, each with its status and message; then the server answers."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from loadtests.server_process import ServerProcess
from tests.e2e.bad_uploads import BAD_UPLOADS, BadUpload
from tests.e2e.tiny_server import CONTEXT, Client, adapter_files


@pytest.fixture(scope="module")
def sound(adapter_folders: tuple[Path, ...]) -> dict[str, bytes]:
    return adapter_files(adapter_folders[0])


@pytest.fixture(autouse=True)
def _the_server_still_answers_and_keeps_nothing(client: Client) -> Iterator[None]:
    before = client.versions()
    yield
    assert client.http.get("/health").status_code == 200
    assert client.generate(tokens=3).status_code == 200
    assert client.versions() == before


@pytest.mark.parametrize("bad", BAD_UPLOADS, ids=lambda bad: str(bad.title))
def test_a_bad_upload_is_refused_with_the_reason(client: Client, sound: dict[str, bytes], bad: BadUpload) -> None:
    files = bad.spoil(sound)
    url = f"/adapters/{bad.name}"
    if bad.body is None:
        answer = client.http.put(url, files={name: (name, content) for name, content in files.items()})
    else:
        content, content_type = bad.body(files)
        answer = client.http.put(url, content=content, headers={"content-type": content_type})
    assert answer.status_code == bad.status, answer.text
    assert set(answer.json()) == {"error", "error_type"}
    missing = [words for words in bad.says if words not in answer.json()["error"]]
    assert not missing, f"{missing} not in {answer.json()['error']}"


@dataclass(frozen=True)
class BadRequest:
    """A bad request: `says` is what its answer names."""

    title: str
    status: int
    says: tuple[str, ...]
    body: object = None
    parameters: Mapping[str, object] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"
    path: str = "/generate"


BAD_REQUESTS = (
    BadRequest("no JSON", 422, ("JSON",), body=b"{inputs: 'a'}"),
    BadRequest("an empty body", 422, ("object",), body=b""),
    BadRequest("a list", 422, ("object",), body=["a"]),
    BadRequest("deep nesting", 422, ("JSON",), body=b"[" * 100_000),
    BadRequest("not UTF-8", 422, ("UTF-8",), body=b'{"inputs": "\xff\xfe"}'),
    BadRequest("half a character", 422, ("inputs", "surrogate"), body=b'{"inputs": "\\ud800"}'),
    BadRequest("no inputs", 422, ("inputs",), body={}),
    BadRequest("empty inputs", 422, ("inputs", "empty"), body={"inputs": ""}),
    BadRequest("inputs that are a number", 422, ("inputs",), body={"inputs": 5}),
    BadRequest("an unknown field", 422, ("prompt",), body={"inputs": "a", "prompt": "b"}),
    BadRequest("a body above the limit", 413, ("larger",), body={"inputs": "a" * (3 << 20)}),
    BadRequest("an unknown parameter", 422, ("ranks",), parameters={"ranks": 4}),
    BadRequest("no tokens", 422, ("max_new_tokens",), parameters={"max_new_tokens": 0}),
    BadRequest("tokens in words", 422, ("max_new_tokens",), parameters={"max_new_tokens": "5"}),
    BadRequest("true tokens", 422, ("max_new_tokens",), parameters={"max_new_tokens": True}),
    BadRequest("tokens past the context", 422, ("max_new_tokens", str(CONTEXT)), parameters={"max_new_tokens": 10**6}),
    BadRequest("a prompt past the context", 422, (str(CONTEXT),), body={"inputs": "a[" * 20_000}),
    BadRequest("a negative temperature", 422, ("temperature",), parameters={"temperature": -1}),
    BadRequest("top_p of nothing", 422, ("top_p",), parameters={"top_p": 0}),
    BadRequest("top_p above one", 422, ("top_p",), parameters={"top_p": 1.5}),
    BadRequest("top_k of nothing", 422, ("top_k",), parameters={"top_k": 0}),
    BadRequest("NaN as temperature", 422, ("temperature",), body=b'{"inputs": "a", "parameters": {"temperature": NaN}}'),
    BadRequest("a negative seed", 422, ("seed",), parameters={"seed": -1}),
    BadRequest("an empty stop", 422, ("stop",), parameters={"stop": [""]}),
    BadRequest("a hundred stops", 422, ("stop",), parameters={"stop": ["a"] * 100}),
    BadRequest("two wrongs, both named", 422, ("top_p", "top_k"), parameters={"top_p": 2, "top_k": -1}),
    BadRequest("a grammar", 422, ("grammar", "not available"), parameters={"grammar": {"type": "regex", "value": "a"}}),
    BadRequest("best of two", 422, ("best_of",), parameters={"best_of": 2}),
    BadRequest("a watermark", 422, ("watermark",), parameters={"watermark": True}),
    BadRequest("rank zero", 422, ("rank",), parameters={"adapter_id": "sound", "rank": 0}),
    BadRequest("a rank it lacks", 422, ("rank 17", "1, 2, 3"), parameters={"adapter_id": "sound", "rank": 17}),
    BadRequest("half a rank", 422, ("rank",), parameters={"adapter_id": "sound", "rank": 1.5}),
    BadRequest("a rank in words", 422, ("rank", "max"), parameters={"adapter_id": "sound", "rank": "big"}),
    BadRequest("a rank of the base", 422, ("rank", "adapter"), parameters={"rank": 4}),
    BadRequest("two ranks", 422, ("rank",), parameters={"adapter_id": "sound@4", "rank": 8}),
    BadRequest("a rank in words, by header", 422, ("x-lora-rank",), headers={"X-LoRA-Adapter": "sound", "X-LoRA-Rank": "x"}),
    BadRequest("a rank it lacks, by header", 422, ("1, 2, 3",), headers={"X-LoRA-Adapter": "sound", "X-LoRA-Rank": "99"}),
    BadRequest("an unknown policy", 422, ("rank_policy", "quality"), parameters={"adapter_id": "sound", "rank_policy": "x"}),
    BadRequest("an unknown adapter", 404, ("nobody",), parameters={"adapter_id": "nobody"}),
    BadRequest("an unknown adapter, by header", 404, ("nobody",), headers={"X-LoRA-Adapter": "nobody"}),
    BadRequest("a path as adapter", 404, ("etc",), parameters={"adapter_id": "../../etc/passwd"}),
    BadRequest("a stream of an unknown adapter", 404, ("no",), parameters={"adapter_id": "no"}, path="/generate_stream"),
    BadRequest("a route that is not there", 404, (), path="/generated"),
    BadRequest("a method it lacks", 405, (), method="GET"),
    BadRequest("a look at an unknown adapter", 404, ("nobody",), method="GET", path="/adapters/nobody"),
    BadRequest("an unknown adapter's end", 404, ("nobody",), method="DELETE", path="/adapters/nobody"),
)


@pytest.fixture(scope="module", autouse=True)
def _a_sound_adapter(server: ServerProcess, adapter_folders: tuple[Path, ...]) -> Iterator[None]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        Client(http).put("sound", adapter_folders[0]).raise_for_status()
        yield
        http.delete("/adapters/sound").raise_for_status()


@pytest.mark.parametrize("bad", BAD_REQUESTS, ids=lambda bad: str(bad.title))
def test_a_bad_request_is_refused_with_the_reason(client: Client, bad: BadRequest) -> None:
    body = {"inputs": "a", "parameters": dict(bad.parameters)} if bad.body is None else bad.body
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **bad.headers}
    answer = client.http.request(bad.method, bad.path, content=content, headers=headers)
    assert answer.status_code == bad.status, answer.text
    assert set(answer.json()) == {"error", "error_type"}
    missing = [words for words in bad.says if words not in answer.json()["error"]]
    assert not missing, f"{missing} not in {answer.json()['error']}"


def test_the_table_is_as_long_as_the_issue_asks() -> None:
    assert len(BAD_UPLOADS) + len(BAD_REQUESTS) >= 25
    assert len({bad.title for bad in (*BAD_UPLOADS, *BAD_REQUESTS)}) == len(BAD_UPLOADS) + len(BAD_REQUESTS)
