"""OpenTelemetry traces, sent by OTLP over HTTP to where the standard variables say.

Configured by OpenTelemetry's own environment variables alone (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME,
OTEL_TRACES_SAMPLER, ...). Without an endpoint nothing of it is imported. No prompt, no generated text and no key becomes an
attribute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple

from service.settings import SettingsError
from service.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
_FLUSH_S = 5.0
"""How long the end of the server waits for a collector that does not answer."""

Attributes = Mapping[str, str | int | Sequence[str]]


class Phase(NamedTuple):
    """A part of a span, in seconds after the span's start."""

    name: str
    start_s: float
    end_s: float


class Tracing:
    """Makes the spans of requests and sends them in the background. `close` at the end."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("dylora", VERSION)

    @classmethod
    def from_environment(cls) -> Tracing | None:
        """Traces as the environment asks for them; None where it names no endpoint.

        Raises:
            SettingsError: it asks for what is not installed, or for another protocol than ours.
        """
        asked_by = next((name for name in ENDPOINTS if os.environ.get(name)), None)
        if asked_by is None or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return None
        protocol_by = next((name for name in _PROTOCOLS if os.environ.get(name)), "")
        if os.environ.get(protocol_by, _PROTOCOL) != _PROTOCOL:
            raise SettingsError(f"{protocol_by}: {os.environ[protocol_by]!r} is not legal: traces are sent as {_PROTOCOL}")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise SettingsError(f"{asked_by}: traces need the extra 'tracing': pip install 'dylora-serve[tracing]'") from None
        ours = Resource.create({SERVICE_NAME: "dylora-serve", SERVICE_VERSION: VERSION})
        # Merged last: OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over our own words.
        provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        sender = Thread(target=self._provider.shutdown, daemon=True)  # itself it would wait half a minute
        sender.start()
        sender.join(_FLUSH_S)

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[RequestTrace]:
        """The span of one HTTP request, as a child of the caller's if the headers carry W3C's `traceparent`.

        Inside the block it is the `current_trace`.
        """
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        caller = TraceContextTextMapPropagator().extract(headers)
        attributes = {"http.request.method": method}
        span = self._tracer.start_span(method, context=caller, kind=SpanKind.SERVER, attributes=attributes)
        trace = RequestTrace(self._tracer, span)
        token = _current.set(trace)
        try:
            yield trace
        finally:
            _current.reset(token)
            span.end()


@dataclass(frozen=True)
class RequestTrace:
    """The span of one HTTP request. Thread-safe."""

    _tracer: Tracer
    _span: Span

    @property
    def trace_id(self) -> str:
        """32 hex digits, for the log."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def answered(self, name: str, attributes: Attributes, *, is_error: bool) -> None:
        """Name the request's span by what turned out to be asked, and say how it was answered."""
        self._span.update_name(name)
        _describe(self._span, attributes, is_error)

    def add(
        self, name: str, seconds: float, attributes: Attributes, phases: Sequence[Phase] = (), *, is_error: bool = False
    ) -> None:
        """A child span that ended now, `seconds` long, with its phases as children. The request's own may have ended."""
        from opentelemetry.trace import set_span_in_context

        end_ns = time.time_ns()
        start_ns = end_ns - _ns(seconds)
        span = self._tracer.start_span(name, context=set_span_in_context(self._span), start_time=start_ns)
        _describe(span, attributes, is_error)
        for phase in phases:
            part = self._tracer.start_span(
                phase.name, context=set_span_in_context(span), start_time=start_ns + _ns(phase.start_s)
            )
            part.end(start_ns + _ns(phase.end_s))
        span.end(end_ns)


def current_trace() -> RequestTrace | None:
    """That of the request which the running task serves; None without tracing."""
    return _current.get()


_current: ContextVar[RequestTrace | None] = ContextVar("current_trace", default=None)


def _describe(span: Span, attributes: Attributes, is_error: bool) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attributes(attributes)
    if is_error:
        span.set_status(StatusCode.ERROR)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
