"""What an answer of a replica says beside what it says on one machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.http.asgi.replica import NamedReplica
from tests.http_harness import parts


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with parts(tmp_path) as (app, _, _), TestClient(NamedReplica(app, "one"), raise_server_exceptions=False) as client:
        assert app.state.services.registry.wait_loaded(10)
        yield client


@pytest.mark.parametrize("path", ["/adapters", "/nowhere"])
def test_every_answer_names_its_replica(client: TestClient, path: str) -> None:
    assert client.get(path).headers["x-replica"] == "one"


def test_the_proxy_tells_the_id_that_it_gave_and_an_id_of_ours_is_told_here(client: TestClient) -> None:
    assert "x-request-id" not in client.get("/health", headers={"X-Request-Id": "the-proxys"}).headers
    harmful = client.get("/health", headers={"X-Request-Id": "a b"})
    assert len(harmful.headers["x-request-id"]) == 32
    assert len(client.get("/health").headers["x-request-id"]) == 32
