"""OpenTelemetry traces: a span per request, with spans for waiting, waking, reading and answering inside.

The libraries are the extra `otel` and are imported only when a collector is named.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import dormouse
from dormouse.api.call import Call
from dormouse.api.request_log import fields_of
from dormouse.domain.errors import BadSettings
from dormouse.domain.requests import Finished

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_FLUSH_TIMEOUT_MS = 5000
_NS = 1_000_000_000


class Tracer:
    """Makes the spans of calls that have ended, from the times that these noted; `processor` sends them."""

    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "dormouse", "service.version": dormouse.__version__})
        # A provider of our own: the process-wide one belongs to whoever embeds us.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("dormouse")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, call: Call) -> None:
        """Hand a call's spans over; they leave in the background."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        # Calls note the monotonic clock, spans want the wall clock.
        offset = time.time_ns() - int(time.monotonic() * _NS)
        parent = self._propagator.extract({"traceparent": call.traceparent} if call.traceparent else {})
        span = self._tracer.start_span(
            f"{call.known_method} {call.route}",
            parent,
            attributes={"dormouse.request_id": call.id}
            | {f"dormouse.{name}": value for name, value in fields_of(call).items()},
            start_time=offset + int(call.started_at * _NS),
        )
        if call.status >= 500 or any(reply.outcome == "failed" for reply in call.replies):
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span, parent)
        for name, begin, end in _phases(call):
            phase = self._tracer.start_span(name, inside, start_time=offset + int(begin * _NS))
            phase.end(offset + int(end * _NS))
        span.end(offset + int(call.ended_at * _NS))

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        self._provider.force_flush(_FLUSH_TIMEOUT_MS)
        self._provider.shutdown()


def _phases(call: Call) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end of what the engine did, in monotonic seconds; nothing of replies that were cut."""
    for reply in call.replies:
        if isinstance(reply.end, Finished):
            timings, begin = reply.end.timings, reply.submitted_at
            for name, seconds in (
                ("queue", timings.queued_s),
                ("wake", timings.wake_s),
                ("prefill", timings.prefill_s),
                ("decode", timings.decode_s),
            ):
                yield name, begin, begin + seconds
                begin += seconds


@contextmanager
def open_tracer(endpoint: str | None) -> Iterator[Tracer | None]:
    """A tracer that sends to the collector at `endpoint`; None without one. Raises BadSettings."""
    if endpoint is None:
        yield None
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        message = f"--otlp-endpoint needs the extra `otel` ({error}): pip install 'dormouse[otel]'"
        raise BadSettings([message]) from error
    path = "/v1/traces"
    url = endpoint if endpoint.endswith(path) else endpoint.rstrip("/") + path
    tracer = Tracer(BatchSpanProcessor(OTLPSpanExporter(url)))
    try:
        yield tracer
    finally:
        tracer.close()
