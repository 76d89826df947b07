"""Traces as a collector gets them: a real one, of OTLP over HTTP, on loopback."""

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service.http.tracing import ENDPOINTS, Tracing
from service.settings import SettingsError
from tests.documents import SERVICE
from tests.http_harness import Server, in_process
from tests.test_cli import process

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "sesame"


@dataclass
class Collector:
    """What has been sent to it."""

    url: str
    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)

    def named(self, name: str) -> Span:
        """The only span of that name."""
        found = [span for span in self.spans if span.name == name]
        assert len(found) == 1, [span.name for span in self.spans]
        return found[0]

    def children(self, parent: Span) -> list[Span]:
        """In the order they began."""
        found = [span for span in self.spans if span.parent_span_id == parent.span_id]
        return sorted(found, key=lambda span: span.start_time_unix_nano)


def attributes(holder: Any) -> dict[str, Any]:
    """Attributes of a span or resource as Python has them."""
    found = {}
    for pair in holder.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        found[pair.key] = [each.string_value for each in value.values] if kind == "array_value" else value
    return found


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                content = gzip.decompress(content)
            assert self.path == "/v1/traces"
            for each in ExportTraceServiceRequest.FromString(content).resource_spans:
                received.resources.append(attributes(each.resource))
                received.spans.extend(span for scope in each.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        received = Collector(f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield received
        server.shutdown()
        thread.join()


@pytest.fixture
def tracing(collector: Collector) -> Iterator[Tracing]:
    """To be closed before one looks at what the collector has."""
    tracing = Tracing.from_environment()
    assert tracing is not None
    yield tracing
    tracing.close()


@pytest.fixture
def server(tracing: Tracing, tmp_path: Path) -> Iterator[Server]:
    with in_process(tmp_path, tracing=tracing) as server:
        yield server


def test_a_request_is_told_with_its_phases(server: Server, tracing: Tracing, collector: Collector) -> None:
    answer = server.generate(f"open {SECRET}", {"X-Request-Id": "abc"}, adapter_id="demo", rank=2, max_new_tokens=5)
    tracing.close()
    request, generate = collector.named("POST /generate"), collector.named("generate")
    assert request.kind == Span.SPAN_KIND_SERVER
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/generate",
        "dylora.request_id": "abc",
    }
    assert generate.parent_span_id == request.span_id
    assert attributes(generate) == {
        "dylora.adapter": "demo",
        "dylora.rank": 2,
        "dylora.rank_reason": "requested",
        "dylora.mode": "merged",
        "dylora.outcome": "ok",
        "gen_ai.usage.input_tokens": len(f"open {SECRET}"),
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert [name for name in attributes(generate) if f"`{name}`" not in SERVICE] == []
    phases = collector.children(generate)
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    assert request.start_time_unix_nano <= generate.start_time_unix_nano <= phases[0].start_time_unix_nano
    for phase, following in pairwise(phases):
        assert phase.end_time_unix_nano == following.start_time_unix_nano
    assert phases[-1].end_time_unix_nano <= generate.end_time_unix_nano
    told = repr([attributes(span) for span in collector.spans])
    assert SECRET not in told
    assert answer.json()["generated_text"] not in told


def test_every_sequence_of_a_request_has_a_span(server: Server, tracing: Tracing, collector: Collector) -> None:
    server.generate(best_of=2, do_sample=True, max_new_tokens=2)
    tracing.close()
    children = collector.children(collector.named("POST /generate"))
    assert [attributes(child)["dylora.adapter"] for child in children] == ["base", "base"]


def test_the_callers_trace_goes_on(server: Server, tracing: Tracing, collector: Collector) -> None:
    server.generate(headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}, max_new_tokens=1)
    tracing.close()
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    assert collector.named("POST /generate").parent_span_id.hex() == PARENT_ID


@pytest.mark.parametrize("flags", ["00", "01"])
def test_a_caller_decides_whether_its_trace_is_kept(server: Server, tracing: Tracing, collector: Collector, flags: str) -> None:
    server.generate(headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-{flags}"}, max_new_tokens=1)
    tracing.close()
    assert bool(collector.spans) is (flags == "01")


@pytest.mark.parametrize("header", ["", "00-zz-1-01", f"00-{'0' * 32}-{PARENT_ID}-01", "x" * 500])
def test_a_traceparent_that_is_none_begins_a_new_trace(
    server: Server, tracing: Tracing, collector: Collector, header: str
) -> None:
    assert server.generate(headers={"traceparent": header}, max_new_tokens=1).status_code == 200
    tracing.close()
    assert collector.named("POST /generate").parent_span_id == b""


def test_errors_are_told_by_type(server: Server, tracing: Tracing, collector: Collector) -> None:
    server.generate(f"open {SECRET}", adapter_id="nobody")
    server.engine.fail_next(SECRET)
    server.generate(f"open {SECRET}", adapter_id="demo", rank=2)
    server.client.get("/adapters/nobody")
    server.client.get(f"/no/such/{SECRET}")
    server.client.get("/health")
    server.client.get("/metrics")
    tracing.close()
    answered = [
        (span.name, attributes(span)["http.response.status_code"], attributes(span)["error.type"], span.status.code)
        for span in collector.spans
        if span.kind == Span.SPAN_KIND_SERVER
    ]
    assert answered == [
        ("POST /generate", 404, "adapter_not_found", Status.STATUS_CODE_UNSET),
        ("POST /generate", 500, "generation", Status.STATUS_CODE_ERROR),
        ("GET /adapters/{name}", 404, "adapter_not_found", Status.STATUS_CODE_UNSET),
        ("GET", 404, "not_found", Status.STATUS_CODE_UNSET),
    ]
    generate = collector.named("generate")
    assert (attributes(generate)["dylora.outcome"], generate.status.code) == ("failed", Status.STATUS_CODE_ERROR)
    assert collector.children(generate) == []
    assert SECRET not in repr(collector.spans)


def test_the_log_has_the_traces_id(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "dylora"):
        server.generate(headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}, max_new_tokens=1)
        server.generate(headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}, adapter_id="nobody")
    lines = [record.getMessage() for record in caplog.records if "request_id=" in record.getMessage()]
    assert [line.split()[0] for line in lines if f"trace_id={TRACE_ID}" in line] == ["request", "answered"]


def test_a_server_process_sends_what_it_has_before_it_ends(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    with process(tmp_path) as server:
        server.client.get("/info")
        server.popen.terminate()
        assert server.popen.wait(20) == 0
    assert attributes(collector.named("GET /info"))["http.response.status_code"] == 200
    assert collector.resources[0]["service.name"] == "mine"


def test_a_collector_that_is_not_there_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # bound, and not listening
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with process(tmp_path, "--log-format=json") as server:
            assert server.client.get("/info").status_code == 200
            server.popen.terminate()
            assert server.popen.wait(20) == 0
    assert all(json.loads(line) for line in server.log)


def test_without_an_endpoint_there_is_no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINTS:
        monkeypatch.setenv(name, "")  # as compose.yaml passes an unset variable on
    assert Tracing.from_environment() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert Tracing.from_environment() is None


def test_a_protocol_that_is_not_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(SettingsError, match="OTEL_EXPORTER_OTLP_PROTOCOL: 'grpc' is not legal"):
        Tracing.from_environment()
