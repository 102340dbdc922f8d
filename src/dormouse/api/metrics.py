"""Prometheus metrics at `/metrics`; what they mean is in `metric_table.py`.

Engine and store keep their own counts, which are read when somebody asks. Times are observed when a request
ends.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dormouse.api import metric_table as table
from dormouse.api.call import Call, Reply
from dormouse.api.health import diagnose
from dormouse.api.metric_table import Reading, Recorded, S
from dormouse.api.rate_limits import RateLimits
from dormouse.api.services import Services
from dormouse.domain.requests import Finished


class _Readings(Collector):
    """Reads runtime, engine, store, host and limits when Prometheus asks."""

    def __init__(self, services: Services, limits: RateLimits) -> None:
        self._services = services
        self._host = services.host
        self._store = services.store
        self._limits = limits

    def collect(self) -> Iterator[Metric]:
        """One family per reading; those of runtime and engine when there is one."""
        if self._host.has_started:
            engine = self._host.served.engine
            yield from _families(table.OF_RUNTIME, engine.runtime)
            yield from _families(table.OF_ENGINE, engine.stats())
        yield from _families(table.OF_STORE, self._store.stats())
        yield from _families(table.OF_HOST, self._host)
        yield from _families(table.OF_LIMITS, self._limits)
        yield from _families(table.OF_HEALTH, diagnose(self._services))


def _families(readings: Iterable[Reading[S]], now: S) -> Iterator[Metric]:
    for reading in readings:
        family_of = CounterMetricFamily if reading.kind == "counter" else GaugeMetricFamily
        family = family_of(reading.name, reading.text, labels=reading.labels)
        for value, number in reading.read(now):
            family.add_metric([value] if reading.label else [], number)
        yield family


class Metrics:
    """The metrics of one application, in a registry of its own."""

    def __init__(self, services: Services, limits: RateLimits) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Readings(services, limits))
        self._counters: dict[Recorded, Counter] = {}
        self._histograms: dict[Recorded, Histogram] = {}
        for one in table.RECORDED:
            if one.buckets:
                self._histograms[one] = Histogram(
                    one.name, one.text, one.labels, buckets=one.buckets, registry=self.registry
                )
            else:
                self._counters[one] = Counter(one.name, one.text, one.labels, registry=self.registry)

    def record(self, call: Call) -> None:
        """Count a call that has ended."""
        labels = (call.route, call.known_method, str(call.status), call.dialect)
        self._counters[table.REQUESTS].labels(*labels).inc()
        self._histograms[table.REQUEST_SECONDS].labels(call.dialect).observe(call.ended_at - call.started_at)
        if call.first_text_at is not None:
            self._observe(table.FIRST_TEXT_SECONDS, call.first_text_at - call.started_at)
        for reply in call.replies:
            self._record_reply(reply)

    def _record_reply(self, reply: Reply) -> None:
        self._counters[table.REPLIES].labels(reply.outcome).inc()
        pieces = list(reply.pieces)  # an aborted one's may still grow
        for before, after in itertools.pairwise(pieces):
            self._observe(table.GAP_SECONDS, after - before)
        if isinstance(reply.end, Finished):
            timings = reply.end.timings
            self._observe(table.QUEUE_SECONDS, timings.queued_s)
            self._observe(table.PREFILL_SECONDS, timings.prefill_s)
            self._observe(table.DECODE_SECONDS, timings.decode_s)
            if reply.end.usage.disk_tokens:
                self._observe(table.WAKE_SECONDS, timings.wake_s)

    def _observe(self, histogram: Recorded, seconds: float) -> None:
        self._histograms[histogram].observe(seconds)


def router(metrics: Metrics) -> APIRouter:
    """The route that Prometheus asks. Where keys are in use, it needs an admin key."""
    routes = APIRouter()

    @routes.get("/metrics", include_in_schema=False)
    async def show(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        # The store counts under its lock: not on the event loop.
        body = await asyncio.to_thread(encode, metrics.registry)
        return Response(body, media_type=content_type)

    return routes
