"""The edge: what stands between the socket and the routes, in this order.

| from outside | |
| --- | --- |
| `Observe` | gives the request its id, and reports it when it has ended; sees every answer |
| `HostCheck` | while there are no keys, 403 to foreign names and to web pages of others |
| CORS | answers preflights, which carry no key, and puts its headers onto refusals too |
| `Access` | finds the caller; 401, 403, 429 |
| `BodyLimit` | 413 |
| `Unexpected` | 500, in here so that it gets an id and CORS headers like any other answer |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from dormouse.api import request_id
from dormouse.api.access import Access
from dormouse.api.errors import Unexpected
from dormouse.api.hosts import HostCheck
from dormouse.api.keys import KeyRing
from dormouse.api.limits import BodyLimit
from dormouse.api.metrics import Metrics
from dormouse.api.observe import Observe, Observer
from dormouse.api.rate_limits import RateLimits
from dormouse.api.request_log import log_call

_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
_SHOWN_HEADERS = (request_id.HEADER, request_id.ANTHROPIC_HEADER, "retry-after")


@dataclass(frozen=True, slots=True)
class Edge:
    """Without `keys` everybody is the default tenant, and may administer, but may call the server by its
    address and by `allowed_hosts` only. `observers` see each ended call."""

    keys: KeyRing | None = None
    limits: RateLimits = field(default_factory=RateLimits)
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    observers: tuple[Observer, ...] = ()


def install(
    app: FastAPI, edge: Edge, metrics: Metrics, *, max_body_nbytes: int, larger: Mapping[str, int]
) -> None:
    """Put the edge around the routes. `larger` are the bounds of paths whose bodies are streamed."""
    # What is added last is the outermost.
    app.add_middleware(Unexpected)
    app.add_middleware(BodyLimit, max_nbytes=max_body_nbytes, larger=larger)
    app.add_middleware(Access, keys=edge.keys, limits=edge.limits)
    if edge.cors_origins:
        # No credentials: keys come in headers, and cookies are not used.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=edge.cors_origins,
            allow_methods=_METHODS,
            allow_headers=("*",),
            expose_headers=_SHOWN_HEADERS,
        )
    app.add_middleware(
        HostCheck, keys=edge.keys, allowed_hosts=edge.allowed_hosts, cors_origins=edge.cors_origins
    )
    observers = (metrics.record, log_call, *edge.observers)
    app.add_middleware(Observe, limits=edge.limits, observers=observers)
