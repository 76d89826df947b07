import inspect
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from service.http.openai.schemas import ChatRequest, CompletionRequest
from service.http.routes import adapters, generate, openai, ops, pages, quality, vllm
from service.http.routes.quality import CalibrationRequest
from service.http.routes.vllm import LoadRequest
from service.http.schemas import CompatRequest, GenerateParameters
from service.log import logger
from tests.http_harness import Server, in_process


@pytest.fixture
def service_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the service logs, whatever `configure` did in this process before."""
    handlers, propagates = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [], True
    with caplog.at_level(logging.INFO, logger.name):
        yield caplog
    logger.handlers, logger.propagate = handlers, propagates


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with in_process(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_needs_nothing_from_elsewhere(server: Server, path: str) -> None:
    response = server.client.get(path)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert re.search(r"script-src ('self' )?'sha256-[\w+/=]{44}';", policy)
    assert "unsafe" not in policy
    links = re.findall(r"(?:src|href)=\"([^\"]+)\"|https?://\S+", response.text)
    for link in {link for link in links if link} - {"data:,"}:
        file = server.client.get(f"/{link}")
        assert (file.status_code, file.headers["content-type"].split(";")[0]) in ((200, "text/css"), (200, "text/javascript"))
    assert not re.search(r"\son\w+=|\sstyle=", response.text)


def test_info_has_the_facts_clients_look_for(server: Server) -> None:
    info = server.client.get("/info").json()
    assert (info["model_id"], info["model_dtype"], info["max_total_tokens"]) == ("fake", "float32", 512)
    assert (info["max_input_tokens"], info["max_best_of"], info["max_stop_sequences"]) == (511, 16, 16)
    assert info["model_pipeline_tag"] == "text-generation"
    assert (info["policies"], info["default_policy"]) == (["budget", "latency", "max", "quality"], "quality")


def test_readiness_follows_draining(tmp_path: Path) -> None:
    with in_process(tmp_path) as server:
        assert server.client.get("/ready").json() == {"status": "ready"}
        server.services.draining.set()
        response = server.client.get("/ready")
        assert (response.status_code, response.json()["error"]) == (503, "the server is draining")
        assert server.generate().status_code == 503
        assert server.client.get("/health").status_code == 200


def test_a_failed_engine_is_told_by_the_probes_and_to_whoever_asks(tmp_path: Path) -> None:
    with in_process(tmp_path) as server:
        server.engine.is_alive = False
        for response in (server.client.get("/health"), server.client.get("/ready"), server.generate()):
            assert (response.status_code, response.json()["error_type"]) == (503, "unavailable")
            assert response.json()["error"].startswith("the engine has failed")
            assert response.headers["retry-after"] == "30"


def test_a_bug_is_a_500_that_tells_only_the_request_id(tmp_path: Path, service_log: pytest.LogCaptureFixture) -> None:
    with in_process(tmp_path) as server:
        server.engine.encode = None  # type: ignore[method-assign, assignment]
        response = server.generate("the secret prompt", headers={"X-Request-Id": "abc"})
        assert response.status_code == 500
        assert response.json() == {"error": "internal error; the server's log has it under abc", "error_type": "internal"}
        assert response.headers["x-request-id"] == "abc"
        assert "the secret prompt" not in service_log.text


def test_the_openapi_document_has_every_field_and_route(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert set(schemas["GenerateParameters"]["properties"]) == set(GenerateParameters.model_fields)
    for model in (CompatRequest, CompletionRequest, ChatRequest, LoadRequest, CalibrationRequest):
        assert set(schemas[model.__name__]["properties"]) == set(model.model_fields)
    assert set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document))) <= set(schemas)
    assert json.dumps(document).count('"$ref"') == json.dumps(document).count('"$ref": "#/components/schemas/')
    assert {path: sorted(methods) for path, methods in document["paths"].items()} == {
        "/": ["get", "post"],
        "/generate": ["post"],
        "/generate_stream": ["post"],
        "/v1/completions": ["post"],
        "/v1/chat/completions": ["post"],
        "/v1/models": ["get"],
        "/v1/models/{name}": ["get"],
        "/adapters": ["get"],
        "/adapters/{name}": ["delete", "get", "put"],
        "/adapters/{name}/export": ["get"],
        "/adapters/{name}/tradeoff": ["get"],
        "/adapters/{name}/calibration": ["post"],
        "/adapters/{name}/calibration/{job}": ["delete", "get"],
        "/v1/load_lora_adapter": ["post"],
        "/v1/unload_lora_adapter": ["post"],
        "/health": ["get"],
        "/ready": ["get"],
        "/info": ["get"],
        "/metrics": ["get"],
    }


def test_requests_are_logged_once_without_their_text(tmp_path: Path, service_log: pytest.LogCaptureFixture) -> None:
    with in_process(tmp_path) as server:
        text = server.generate("the secret prompt", adapter_id="demo", rank=2, headers={"X-Request-Id": "abc"}).json()
    lines = [record.getMessage() for record in service_log.records if "request_id=abc" in record.getMessage()]
    assert len(lines) == 1
    assert "adapter=demo rank=2 reason=requested mode=merged prompt_tokens=17 generated_tokens=20" in lines[0]
    assert "secret" not in service_log.text
    assert text["generated_text"] not in service_log.text


def test_a_request_that_the_engine_did_not_get_has_a_line_too(tmp_path: Path, service_log: pytest.LogCaptureFixture) -> None:
    with in_process(tmp_path) as server:
        server.generate("the secret prompt", adapter_id="nobody", headers={"X-Request-Id": "a"})
        server.client.get("/info?q=secret", headers={"X-Request-Id": "b"})
        server.client.get("/ready", headers={"X-Request-Id": "c"})
    lines = [record.getMessage() for record in service_log.records if "answered" in record.getMessage()]
    assert re.sub(r" seconds=[\d.]+", "", "\n".join(lines)).splitlines() == [
        "answered request_id=a status=404 error_type=adapter_not_found method=POST path=/generate",
        "answered request_id=b status=200 method=GET path=/info",
    ]
    assert "secret" not in service_log.text


def test_head_is_answered_wherever_get_is_and_without_a_body(server: Server) -> None:
    paths = [path for path, methods in server.client.get("/openapi.json").json()["paths"].items() if "get" in methods]
    for path in (*paths, "/docs", "/openapi.json"):
        url = path.replace("{name}", "demo").replace("{job}", "x")
        get, head = server.client.get(url), server.client.head(url)
        assert (head.status_code, head.headers.get("content-type")) == (get.status_code, get.headers.get("content-type")), url
        if path != "/metrics":  # whose length changes
            assert head.headers.get("content-length") == get.headers.get("content-length"), url


def test_a_wrong_path_or_method_is_named_with_what_is_legal(server: Server) -> None:
    nowhere = server.client.get("/nowhere")
    assert nowhere.status_code == 404
    assert nowhere.json()["error"] == "GET '/nowhere': there is no such route; /docs has them all"
    assert "/v1/embeddings" in server.client.post("/v1/embeddings").json()["error"]["message"]
    for path, legal in (("/generate", "POST"), ("/docs", "GET, HEAD"), ("/adapters/x", "DELETE, GET, HEAD, PUT")):
        refused = server.client.patch(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, legal)
        assert refused.json()["error"] == f"PATCH {path!r}: this route has no such method; legal: {legal}"


def test_a_compressed_body_is_refused_by_its_header(server: Server) -> None:
    for encoding, status in (("gzip", 415), ("br", 415), ("identity", 200)):
        response = server.client.post("/generate", json={"inputs": "x"}, headers={"Content-Encoding": encoding})
        assert response.status_code == status
    refused = server.client.post("/v1/completions", content=b"x", headers={"Content-Encoding": "gzip"})
    assert refused.json()["error"]["message"] == "content-encoding: 'gzip' is not read; send the body as it is"


def test_no_dependency_of_a_route_takes_a_thread() -> None:
    def calls(dependant: Dependant) -> Iterator[object]:
        for each in dependant.dependencies:
            yield each.call
            yield from calls(each)

    routers = (adapters, generate, openai, ops, pages, quality, vllm)
    routes = [route for each in routers for route in each.router.routes if isinstance(route, APIRoute)]
    found = {call for route in routes for call in calls(route.dependant)}
    assert len(found) > 3
    assert [each for each in found if not any(map(inspect.iscoroutinefunction, (each, type(each).__call__)))] == []
