"""Who is let in, and what each key may do."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import BaseRoute, Route

from service.keys import Scope, new_token
from service.log import logger
from tests.fake_engine import FakeEngine
from tests.http_harness import Server, adapter, files_of, folder_of, in_process
from tests.http_keys import MadeKey, make_key, write_keys

FULL = make_key("full")
WITHOUT: dict[Scope, MadeKey] = {
    scope: make_key(f"without-{scope.value.replace(':', '-')}", [each for each in Scope if each is not scope])
    for scope in Scope
}
"""By scope, a key that has all the others."""
ALICE = make_key("alice", private_uploads=True)
BOB = make_key("bob", private_uploads=True)
NARROW = make_key("narrow", default_adapter="demo", rank_floor=2, rank_ceiling=3)
POLICED = make_key("policed", default_adapter="demo", rank_policy="max")
TWO_A_MINUTE = make_key("two-a-minute", requests_per_minute=2)

OPEN_ROUTES = {"/health", "/ready", "/", "/docs", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js"}
"""Answered to GET and HEAD without a key."""
ANY_KEY_ROUTES = {"/info", "/openapi.json"}
"""Facts of the server that any key may see."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    keys = (FULL, ALICE, BOB, NARROW, POLICED, TWO_A_MINUTE, *WITHOUT.values())
    path = write_keys(tmp_path / "keys.json", *keys)
    with in_process(tmp_path, api_keys_file=path, engine=FakeEngine(max_context_tokens=200)) as server:
        yield server


def methods_and_paths(routes: Sequence[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every method and path that the application answers, included routers too."""
    for route in routes:
        if isinstance(route, Route):
            yield from ((method, prefix + route.path) for method in sorted(route.methods or ()))
        else:  # FastAPI's holder of an included router; anything else is a mount, which this test must learn to look into
            included: Any = route
            yield from methods_and_paths(included.original_router.routes, prefix + included.include_context.prefix)


def ask(server: Server, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    body = {"inputs": "x", "model": "x", "prompt": "x"} if method == "POST" else None
    return server.client.request(method, path.replace("{name}", "demo"), json=body, headers=headers)


def test_no_route_lets_anyone_in_without_the_right_key(server: Server) -> None:
    routes = list(methods_and_paths(server.client.app.routes))  # type: ignore[attr-defined]
    assert {("POST", "/generate"), ("GET", "/metrics"), ("PUT", "/adapters/{name}"), ("GET", "/docs")} <= set(routes)
    wrong, _ = new_token()
    for method, path in routes:
        if method in ("GET", "HEAD") and path in OPEN_ROUTES:
            assert ask(server, method, path, {}).status_code == 200
            continue
        for headers in ({}, {"Authorization": f"Bearer {wrong}"}, {"Authorization": "Basic Og=="}):
            response = ask(server, method, path, headers)
            assert response.status_code == 401, (method, path, headers)
            assert response.headers["www-authenticate"].startswith('Bearer realm="dylora"')
        refused = [scope for scope, key in WITHOUT.items() if ask(server, method, path, key.headers).status_code == 403]
        assert len(refused) == (0 if path in ANY_KEY_ROUTES else 1), (method, path, refused)


@pytest.mark.parametrize("path", ["/nowhere", "/metrics%0A", "/metrics/", "/%6detrics", "/health/../metrics"])
def test_no_spelling_of_a_path_gets_around_the_key(server: Server, path: str) -> None:
    assert server.client.get(path).status_code == 401
    assert "dylora_" not in server.client.get(path, headers=WITHOUT[Scope.METRICS].headers).text


def test_nothing_was_done_for_those_who_were_turned_away(server: Server, tmp_path: Path) -> None:
    for headers in ({}, WITHOUT[Scope.GENERATE].headers):
        assert server.generate(headers=headers).status_code in (401, 403)
    files = files_of(folder_of(adapter(seed=5), tmp_path / "upload"))
    for headers in ({}, WITHOUT[Scope.ADAPTERS_WRITE].headers):
        assert server.client.put("/adapters/new", files=files, headers=headers).status_code in (401, 403)
        assert server.client.delete("/adapters/demo", headers=headers).status_code in (401, 403)
    assert server.engine.submitted == []
    assert [each.name for each in server.store.list()] == ["demo"]


def test_the_answer_says_what_is_missing(server: Server) -> None:
    absent = server.generate()
    assert absent.json() == {
        "error": "no API key; send it in the header 'Authorization: Bearer KEY'",
        "error_type": "unauthorized",
    }
    assert absent.headers["www-authenticate"] == 'Bearer realm="dylora"'
    assert absent.headers["x-request-id"]
    wrong = server.generate(headers={"Authorization": "Bearer dyl_x"})
    assert wrong.json() == {"error": "the API key is not valid", "error_type": "unauthorized"}
    assert wrong.headers["www-authenticate"] == 'Bearer realm="dylora", error="invalid_token"'
    scope = server.generate(headers=WITHOUT[Scope.GENERATE].headers)
    assert scope.json() == {"error": "this API key lacks the scope 'generate'", "error_type": "forbidden"}
    assert scope.headers["www-authenticate"] == 'Bearer realm="dylora", error="insufficient_scope", scope="generate"'
    assert server.metric("dylora_refused_total", reason="unauthorized") == 2
    assert server.metric("dylora_refused_total", reason="forbidden") == 1
    assert server.metric("dylora_requests_total", adapter="", rank="", mode="none", outcome="refused") == 3


def test_routes_of_openai_answer_in_its_words(server: Server) -> None:
    response = server.client.post("/v1/nothing", json={})
    message = "no API key; send it in the header 'Authorization: Bearer KEY'"
    assert response.json() == {
        "error": {"message": message, "type": "authentication_error", "param": None, "code": "invalid_api_key"}
    }
    known = server.client.post("/v1/nothing", json={}, headers=FULL.headers)
    assert (known.status_code, known.json()["error"]["type"]) == (404, "invalid_request_error")


def test_a_key_is_in_no_log_and_no_metric(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.DEBUG):
        answers = [server.generate(headers=FULL.headers), server.generate(headers={"Authorization": f"Bearer {FULL.token}x"})]
        server.engine.encode = None  # type: ignore[method-assign, assignment]
        answers.append(server.generate(headers=FULL.headers))
    assert [answer.status_code for answer in answers] == [200, 401, 500]
    seen = caplog.text + server.services.metrics.exposition().decode() + "".join(answer.text for answer in answers)
    secret, token_id = FULL.token[17:], FULL.token[4:16]
    assert "key=full" in caplog.text
    assert secret not in seen
    assert token_id not in seen
    assert secret not in repr(server.services)


def test_a_key_brings_its_own_adapter_and_policy(server: Server) -> None:
    def served(key: MadeKey, **parameters: Any) -> tuple[str, str]:
        response = server.generate(headers=key.headers, **parameters)
        assert response.status_code == 200, response.text
        return response.headers["x-lora-adapter"], response.headers["x-lora-rank"]

    assert served(FULL) == ("base", "0")
    assert served(POLICED) == ("demo", "4")
    assert served(POLICED, rank_policy="budget") == ("demo", "1")
    assert served(POLICED, rank=2) == ("demo", "2")
    assert served(POLICED, adapter_id="base") == ("base", "0")
    assert served(POLICED, adapter_id="") == ("base", "0")
    assert served(NARROW) == ("demo", "3")


@pytest.mark.parametrize(
    ("parameters", "rank"),
    [
        ({"rank": 2}, "2"),
        ({"rank": 3}, "3"),
        ({"rank": "auto"}, "3"),
        ({"rank_policy": "max"}, "3"),
        ({"rank_policy": "budget"}, "2"),
    ],
)
def test_what_a_policy_chooses_is_brought_inside_the_bounds_of_a_key(
    server: Server, parameters: dict[str, Any], rank: str
) -> None:
    assert server.generate(headers=NARROW.headers, **parameters).headers["x-lora-rank"] == rank


@pytest.mark.parametrize("rank", [1, 4, "max"])
def test_what_a_request_names_outside_the_bounds_of_a_key_is_refused(server: Server, rank: object) -> None:
    response = server.generate(headers=NARROW.headers, rank=rank)
    assert response.status_code == 422
    assert "outside what this API key may use, 2 to 3; legal here: 2, 3, 'auto'" in response.json()["error"]


def test_a_key_over_its_rate_is_told_when_to_come_back(server: Server) -> None:
    statuses = [server.client.get("/adapters", headers=TWO_A_MINUTE.headers).status_code for _ in range(2)]
    assert statuses == [200, 200]
    response = server.generate(headers=TWO_A_MINUTE.headers)
    assert response.status_code == 429
    assert response.json()["error_type"] == "rate_limited"
    assert 1 <= int(response.headers["retry-after"]) <= 30
    assert server.generate(headers=FULL.headers).status_code == 200
    assert server.metric("dylora_refused_total", reason="rate_limited") == 1


# Private adapters


@pytest.fixture
def with_private(server: Server, tmp_path: Path) -> Server:
    files = files_of(folder_of(adapter(seed=7), tmp_path / "upload"))
    created = server.client.put("/adapters/secret", files=files, headers=ALICE.headers)
    assert (created.status_code, created.json()["private"]) == (201, True)
    return server


def test_the_owner_of_a_private_adapter_does_with_it_what_others_do_with_shared_ones(
    with_private: Server, tmp_path: Path
) -> None:
    client, mine = with_private.client, ALICE.headers
    assert [each["id"] for each in client.get("/adapters", headers=mine).json()] == ["demo", "secret"]
    assert client.get("/adapters/secret", headers=mine).status_code == 200
    assert with_private.generate(adapter_id="secret", headers=mine).status_code == 200
    assert client.get("/adapters/secret/export", headers=mine).status_code == 200
    files = files_of(folder_of(adapter(seed=8), tmp_path / "other"))
    replaced = client.put("/adapters/secret", files=files, headers=mine)
    assert (replaced.status_code, replaced.json()["private"]) == (200, True)
    assert client.delete("/adapters/secret", headers=mine).status_code == 204


@pytest.mark.parametrize("key", [BOB, FULL], ids=["another private key", "a key with every scope"])
def test_to_everyone_else_a_private_adapter_does_not_exist(with_private: Server, key: MadeKey, tmp_path: Path) -> None:
    client, theirs = with_private.client, key.headers
    assert [each["id"] for each in client.get("/adapters", headers=theirs).json()] == ["demo"]
    files = files_of(folder_of(adapter(seed=8), tmp_path / "other"))
    before = with_private.store.get("secret")
    answers = [
        client.get("/adapters/secret", headers=theirs),
        client.get("/adapters/secret/export", headers=theirs),
        client.delete("/adapters/secret", headers=theirs),
        client.put("/adapters/secret", files=files, headers=theirs),
        with_private.generate(adapter_id="secret", headers=theirs),
        with_private.generate(adapter_id="secret@2", headers=theirs),
        with_private.generate(headers={**theirs, "X-LoRA-Adapter": "secret"}),
    ]
    unknown = client.get("/adapters/nobody", headers=theirs)
    expected = {**unknown.json(), "error": unknown.json()["error"].replace("nobody", "secret")}
    assert [(answer.status_code, answer.json()) for answer in answers] == [(404, expected)] * len(answers)
    assert with_private.store.get("secret") == before


def test_a_key_with_private_uploads_changes_no_shared_adapter(server: Server, tmp_path: Path) -> None:
    client, mine = server.client, ALICE.headers
    files = files_of(folder_of(adapter(seed=8), tmp_path / "other"))
    before = server.store.get("demo")
    with server.engine.paused():
        shared = client.post("/adapters/demo/calibration", json={"examples": ["xyz"]}, headers=FULL.headers)
        assert shared.status_code == 202
        load = {"lora_name": "demo", "lora_path": "x", "load_inplace": True}
        answers = [
            client.put("/adapters/demo", files=files, headers=mine),
            client.delete("/adapters/demo", headers=mine),
            client.post("/adapters/demo/calibration", json={"examples": ["xyz"]}, headers=mine),
            client.delete(shared.headers["location"], headers=mine),
            client.post("/v1/load_lora_adapter", json=load, headers=mine),
            client.post("/v1/unload_lora_adapter", json={"lora_name": "demo"}, headers=mine),
        ]
        assert client.delete(shared.headers["location"], headers=FULL.headers).json()["state"] == "cancelled"
    assert [answer.status_code for answer in answers] == [409] * len(answers)
    assert all("'demo' is a shared adapter" in answer.text and "name_taken" in answer.text for answer in answers)
    assert server.store.get("demo") == before


def test_ownership_survives_a_restart_and_needs_its_key(tmp_path: Path) -> None:
    files = files_of(folder_of(adapter(seed=7), tmp_path / "upload"))
    keys = write_keys(tmp_path / "keys.json", FULL, ALICE)
    with in_process(tmp_path, api_keys_file=keys) as server:
        server.client.put("/adapters/secret", files=files, headers=ALICE.headers).raise_for_status()
    with in_process(tmp_path, api_keys_file=keys, stored={}) as server:
        assert server.client.get("/adapters/secret", headers=FULL.headers).status_code == 404
        assert server.generate(adapter_id="secret", headers=ALICE.headers).status_code == 200
    with in_process(tmp_path, stored={}) as server:  # open, and still not everybody's
        assert server.client.get("/adapters/secret").status_code == 404
        assert [each["id"] for each in server.client.get("/adapters").json()] == ["demo"]


def test_a_damaged_private_adapter_stays_its_owners(tmp_path: Path) -> None:
    files = files_of(folder_of(adapter(seed=7), tmp_path / "upload"))
    keys = write_keys(tmp_path / "keys.json", FULL, ALICE)
    with in_process(tmp_path, api_keys_file=keys) as server:
        version = server.client.put("/adapters/secret", files=files, headers=ALICE.headers).json()["version"]
    (tmp_path / "store" / "versions" / version / "adapter_config.json").unlink()
    with in_process(tmp_path, api_keys_file=keys, stored={}) as server:
        assert server.client.get("/adapters/secret", headers=FULL.headers).status_code == 404
        assert server.client.get("/adapters/secret", headers=ALICE.headers).json()["state"] == "unfit"
        assert server.client.delete("/adapters/secret", headers=ALICE.headers).status_code == 204
