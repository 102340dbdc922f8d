"""Prometheus metrics at `/metrics`; what they mean is in `metric_table.py`.

Engine and store keep their own counts, which are read when somebody asks. Times are observed when a request
ends.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dormouse.api import metric_table as table
from dormouse.api.call import Call
from dormouse.api.metric_table import Recorded, Snapshot
from dormouse.api.rate_limits import RateLimits
from dormouse.domain.requests import Finished
from dormouse.models.host import ModelHost
from dormouse.models.swap_counts import SwapCounts
from dormouse.store.block_store import BlockStore


class _Readings(Collector):
    """Reads engine, store and host when Prometheus asks."""

    def __init__(self, host: ModelHost, store: BlockStore, swaps: SwapCounts, limits: RateLimits) -> None:
        self._host = host
        self._store = store
        self._swaps = swaps
        self._limits = limits

    def collect(self) -> Iterator[Metric]:
        """One family per reading, all of the same moment."""
        engine = self._host.served.engine.stats()
        now = Snapshot(engine, self._store.stats(), self._swaps, self._limits)
        for reading in table.READINGS:
            family_of = CounterMetricFamily if reading.kind == "counter" else GaugeMetricFamily
            family = family_of(reading.name, reading.text, labels=reading.labels)
            for value, number in reading.read(now):
                family.add_metric([value] if reading.label else [], number)
            yield family


class Metrics:
    """The metrics of one application, in a registry of its own."""

    def __init__(self, host: ModelHost, store: BlockStore, swaps: SwapCounts, limits: RateLimits) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Readings(host, store, swaps, limits))
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
        if call.outcome is not None:
            self._counters[table.REPLIES].labels(call.outcome).inc()
        pieces = list(call.pieces)  # an aborted request's may still grow
        if pieces:
            self._observe(table.FIRST_TEXT_SECONDS, pieces[0] - call.started_at)
        for before, after in itertools.pairwise(pieces):
            self._observe(table.GAP_SECONDS, after - before)
        if isinstance(call.end, Finished):
            self._record_timings(call.end)

    def _record_timings(self, end: Finished) -> None:
        timings = end.timings
        self._observe(table.QUEUE_SECONDS, timings.queued_s)
        self._observe(table.PREFILL_SECONDS, timings.prefill_s)
        self._observe(table.DECODE_SECONDS, timings.decode_s)
        if end.usage.disk_tokens:
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
