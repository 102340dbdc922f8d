"""Every metric, declared once: what `/metrics` shows and docs/metrics.md explains come from here.

No label says who asked: tenants, keys and agents are in the logs, which only the operator reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dormouse.api.health import Diagnosis
from dormouse.api.rate_limits import RateLimits
from dormouse.engine.stats import EngineStats
from dormouse.models.host import ModelHost
from dormouse.runtimes.base import Runtime
from dormouse.store.options import StoreStats

_LATENCIES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
_GAPS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


S = TypeVar("S")

Values = Iterable[tuple[str, float]]
"""Values of the label with its values; a metric without a label has one, of the empty string."""


@dataclass(frozen=True, slots=True)
class Reading(Generic[S]):
    """A metric that is read from a snapshot `S` when asked for. `label` is its only one, empty for none."""

    name: str
    kind: str
    text: str
    label: str
    read: Callable[[S], Values]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of its labels."""
        return (self.label,) if self.label else ()


@dataclass(frozen=True, slots=True)
class Recorded:
    """A metric that is added to when a request ends; a histogram if it has `buckets`."""

    name: str
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        """As Prometheus calls it."""
        return "histogram" if self.buckets else "counter"


def _one(value: Callable[[S], float]) -> Callable[[S], Values]:
    return lambda now: [("", value(now))]


def _count(name: str) -> Callable[[StoreStats], Values]:
    return lambda store: [("", store.counts[name])]


def _tokens(engine: EngineStats) -> Values:
    yield "computed", engine.computed_tokens
    yield "memory", engine.memory_tokens
    yield "disk", engine.disk_tokens
    yield "generated", engine.generated_tokens


def _sequences(engine: EngineStats) -> Values:
    yield "running", engine.num_running
    yield "waiting", engine.num_waiting


def _pages(engine: EngineStats) -> Values:
    yield "used", engine.pages_used
    yield "idle", engine.pages_idle
    yield "free", engine.pages_total - engine.pages_used - engine.pages_idle


def _store_bytes(store: StoreStats) -> Values:
    yield "blocks", store.blocks_nbytes
    yield "catalog", store.catalog_nbytes
    yield "quarantine", store.quarantine_nbytes


def _swaps(host: ModelHost) -> Values:
    return [(outcome.value, count) for outcome, count in host.swap_counts.by_outcome().items()]


def _busy(host: ModelHost) -> Values:
    yield "", host.served.engine.busy_s if host.has_started else 0.0


def _reasons(found: Diagnosis) -> Values:
    return [(reason["code"], 1) for reason in found.reasons]


def _limited(limits: RateLimits) -> Values:
    return [(limit.value, count) for limit, count in limits.refused.items()]


OF_RUNTIME: tuple[Reading[Runtime], ...] = (
    Reading(
        "dormouse_runtime_info",
        "gauge",
        "1 for the runtime that computes: torch or mlx.",
        "runtime",
        lambda runtime: [(runtime.name, 1)],
    ),
    Reading(
        "dormouse_working_bytes",
        "gauge",
        "Memory held beside weights and pages for the sequences that ran last: under mlx their K and V "
        "once more.",
        "",
        _one(lambda runtime: runtime.working_nbytes),
    ),
)

OF_ENGINE: tuple[Reading[EngineStats], ...] = (
    Reading(
        "dormouse_tokens_total",
        "counter",
        "Tokens by where they came from: prompt tokens that were computed, found in memory or read from "
        "disk, and generated tokens (whose KV is computed too).",
        "source",
        _tokens,
    ),
    Reading(
        "dormouse_drafted_tokens_total",
        "counter",
        "Tokens that were guessed and computed ahead.",
        "",
        _one(lambda engine: engine.drafted_tokens),
    ),
    Reading(
        "dormouse_accepted_tokens_total",
        "counter",
        "Guessed tokens that were right.",
        "",
        _one(lambda engine: engine.accepted_tokens),
    ),
    Reading(
        "dormouse_preemptions_total",
        "counter",
        "Sequences that went back to the queue because pages were wanted.",
        "",
        _one(lambda engine: engine.preemptions),
    ),
    Reading(
        "dormouse_sequences",
        "gauge",
        "Requests in the engine; waiting ones are the queue's length.",
        "state",
        _sequences,
    ),
    Reading(
        "dormouse_loading_blocks",
        "gauge",
        "Blocks on their way from disk to memory.",
        "",
        _one(lambda engine: engine.num_loading),
    ),
    Reading(
        "dormouse_pages",
        "gauge",
        "Pages of the arena: in use, idle (holding a block that nobody uses right now), free.",
        "state",
        _pages,
    ),
)

OF_STORE: tuple[Reading[StoreStats], ...] = (
    Reading("dormouse_store_bytes", "gauge", "Bytes on disk.", "part", _store_bytes),
    Reading(
        "dormouse_store_quota_bytes",
        "gauge",
        "Bound on the bytes on disk.",
        "",
        _one(lambda store: store.quota_nbytes),
    ),
    Reading(
        "dormouse_store_blocks",
        "gauge",
        "Blocks whose KV is stored.",
        "",
        _one(lambda store: store.num_blocks),
    ),
    Reading(
        "dormouse_store_agents", "gauge", "Agents, asleep or not.", "", _one(lambda store: store.num_agents)
    ),
    Reading(
        "dormouse_store_pending_bytes",
        "gauge",
        "Blocks that wait to be written.",
        "",
        _one(lambda store: store.pending_nbytes),
    ),
    Reading(
        "dormouse_store_written_bytes_total",
        "counter",
        "Bytes of block files written.",
        "",
        _count("bytes_written"),
    ),
    Reading(
        "dormouse_store_read_bytes_total", "counter", "Bytes of block files read.", "", _count("bytes_read")
    ),
    Reading(
        "dormouse_store_evicted_blocks_total",
        "counter",
        "Blocks that lost their file to the quota.",
        "",
        _count("evictions"),
    ),
    Reading(
        "dormouse_store_quarantined_blocks_total",
        "counter",
        "Damaged block files that were set aside; their blocks are computed again.",
        "",
        _count("damaged"),
    ),
    Reading(
        "dormouse_store_failed_writes_total",
        "counter",
        "Writes of blocks that failed, and blocks that found no room in the quota.",
        "",
        _count("failed_writes"),
    ),
    Reading(
        "dormouse_store_refused_blocks_total",
        "counter",
        "Blocks that were not taken because the queue to the disk was full.",
        "",
        _count("refused_puts"),
    ),
)

OF_HOST: tuple[Reading[ModelHost], ...] = (
    Reading("dormouse_swaps_total", "counter", "Model swaps by how they ended.", "outcome", _swaps),
    Reading(
        "dormouse_swap_seconds_total",
        "counter",
        "What the swaps that were done took, in all.",
        "",
        _one(lambda host: host.swap_counts.seconds),
    ),
    Reading(
        "dormouse_engine_busy_seconds",
        "gauge",
        "How long the engine has been at its present step; one that only grows is a step that does not end.",
        "",
        _busy,
    ),
)

OF_LIMITS: tuple[Reading[RateLimits], ...] = (
    Reading(
        "dormouse_rate_limited_total",
        "counter",
        "Requests that were refused, by the limit that they hit.",
        "limit",
        _limited,
    ),
)

OF_HEALTH: tuple[Reading[Diagnosis], ...] = (
    Reading(
        "dormouse_health_reasons",
        "gauge",
        "1 for each reason that `/health` gives at the moment.",
        "code",
        _reasons,
    ),
)

REQUESTS = Recorded(
    "dormouse_requests_total",
    "HTTP requests by route template, method, status and dialect.",
    ("route", "method", "status", "dialect"),
)
REPLIES = Recorded(
    "dormouse_replies_total",
    "Generations by how they ended: stop, length, failed, refused (never begun: a full queue, a prompt "
    "that is too long), aborted (the client went away).",
    ("outcome",),
)
REQUEST_SECONDS = Recorded(
    "dormouse_request_seconds", "From a request's arrival to its last byte.", ("dialect",), _LATENCIES_S
)
QUEUE_SECONDS = Recorded("dormouse_queue_seconds", "Waiting for pages and a turn.", (), _LATENCIES_S)
WAKE_SECONDS = Recorded(
    "dormouse_wake_seconds",
    "Reading blocks from disk; only of requests that had some to read.",
    (),
    _LATENCIES_S,
)
PREFILL_SECONDS = Recorded(
    "dormouse_prefill_seconds",
    "From having what could be found to the first token: what is missing is computed.",
    (),
    _LATENCIES_S,
)
DECODE_SECONDS = Recorded(
    "dormouse_decode_seconds", "From the first token to the last one.", (), _LATENCIES_S
)
FIRST_TEXT_SECONDS = Recorded(
    "dormouse_time_to_first_token_seconds",
    "From a request's arrival to its first text, rendering the prompt included.",
    (),
    _LATENCIES_S,
)
GAP_SECONDS = Recorded(
    "dormouse_inter_token_seconds",
    "Between two pieces of a reply's text; a piece is a token, or a few that came in one step.",
    (),
    _GAPS_S,
)
RECORDED = (
    REQUESTS,
    REPLIES,
    REQUEST_SECONDS,
    QUEUE_SECONDS,
    WAKE_SECONDS,
    PREFILL_SECONDS,
    DECODE_SECONDS,
    FIRST_TEXT_SECONDS,
    GAP_SECONDS,
)

METRICS: tuple[Reading[Any] | Recorded, ...] = (
    *OF_RUNTIME,
    *OF_ENGINE,
    *OF_STORE,
    *OF_HOST,
    *OF_LIMITS,
    *OF_HEALTH,
    *RECORDED,
)
