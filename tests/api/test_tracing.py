"""Traces: a span per request, its phases inside, and where they go."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext
from tests.api.conftest import Service, serving
from tests.engine.harness import WAIT_S

from dormouse.api.edge import Edge
from dormouse.api.tracing import Tracer, open_tracer
from dormouse.domain.errors import BadSettings
from dormouse.runtimes.fake import FakeRuntime

PHASES = ("queue", "wake", "prefill", "decode")
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Exporter(InMemorySpanExporter):
    """Keeps spans. A client has its answer before its span is made, so there is something to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self._requests = threading.Semaphore(0)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        for span in spans:
            if span.name not in PHASES:
                self._requests.release()
        return result

    def by_name(self, num_requests: int) -> dict[str, ReadableSpan]:
        for _ in range(num_requests):
            assert self._requests.acquire(timeout=WAIT_S)
        return {span.name: span for span in self.get_finished_spans()}


@pytest.fixture
def exporter() -> Exporter:
    return Exporter()


@pytest.fixture
def traced(tmp_path: Path, exporter: Exporter) -> Iterator[Service]:
    tracer = Tracer(SimpleSpanProcessor(exporter))
    with serving(tmp_path, FakeRuntime(64), Edge(observers=(tracer.record,))) as service:
        yield service
    tracer.close()


def context_of(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


def test_a_request_is_a_span_with_its_phases_inside(traced: Service, exporter: Exporter) -> None:
    traced.http.headers["x-request-id"] = "mine"
    traced.chat("hello", prompt_cache_key="me")
    spans = exporter.by_name(1)
    assert spans.keys() == {"POST /v1/chat/completions", *PHASES}
    root = spans["POST /v1/chat/completions"]
    assert root.attributes is not None
    assert root.attributes["dormouse.request_id"] == "mine"
    assert (root.attributes["dormouse.agent"], root.attributes["dormouse.generated_tokens"]) == ("me", 8)
    assert "hello" not in str(root.attributes)
    begin, end = times(root)
    for name in PHASES:
        span = spans[name]
        assert span.parent is not None
        assert span.parent.span_id == context_of(root).span_id
        start, stop = times(span)
        assert begin <= start <= stop <= end
        begin = stop - 1000  # rounding: a phase begins where the one before ended


def test_a_callers_trace_goes_on(traced: Service, exporter: Exporter) -> None:
    traced.http.get("/v1/models", headers={"traceparent": PARENT})
    traced.http.get("/health", headers={"traceparent": "nonsense"})
    spans = exporter.by_name(2)
    continued = spans["GET /v1/models"]
    assert f"{context_of(continued).trace_id:032x}" == PARENT.split("-")[1]
    assert continued.parent is not None
    assert f"{continued.parent.span_id:016x}" == PARENT.split("-")[2]
    assert spans["GET /health"].parent is None


class Collector(BaseHTTPRequestHandler):
    """Takes spans as an OpenTelemetry collector does."""

    taken: queue.SimpleQueue[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        self.taken.put((self.path, body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


def test_spans_reach_a_collector_before_the_server_ends(tmp_path: Path) -> None:
    taken: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
    handler = type("Taking", (Collector,), {"taken": taken})
    with HTTPServer(("127.0.0.1", 0), handler) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{collector.server_port}"
            with open_tracer(url) as tracer:
                assert tracer is not None
                with serving(tmp_path, FakeRuntime(64), Edge(observers=(tracer.record,))) as service:
                    service.chat()
            path, body = taken.get(timeout=10)
        finally:
            collector.shutdown()
            thread.join()
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert {"POST /v1/chat/completions", *PHASES} == {span.name for span in resource.scope_spans[0].spans}
    assert "dormouse" in {attribute.value.string_value for attribute in resource.resource.attributes}


def test_no_collector_is_no_tracer_and_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with open_tracer(None) as tracer:
        assert tracer is None
    with pytest.raises(BadSettings, match=r"dormouse\[otel\]"), open_tracer("http://127.0.0.1:1"):
        pytest.fail("there is no exporter to send with")
