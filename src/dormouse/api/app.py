"""The application: routes over a model host and its store, behind the edge."""

from __future__ import annotations

from fastapi import FastAPI

import dormouse
from dormouse.api import agents, edge, errors, health, metrics, openai
from dormouse.models.host import ModelHost
from dormouse.store.block_store import BlockStore


def create_app(
    host: ModelHost, store: BlockStore, *, max_body_nbytes: int, around: edge.Edge | None = None
) -> FastAPI:
    """All routes, each error in its envelope, bodies bounded. `around` is who may come in and who watches;
    by default everybody, and nobody."""
    around = around or edge.Edge()
    measured = metrics.Metrics(host, store, around.swaps, around.limits)
    app = FastAPI(title="Dormouse", version=dormouse.__version__)
    edge.install(app, around, measured, max_body_nbytes=max_body_nbytes)
    errors.install(app)
    app.include_router(openai.router(host))
    app.include_router(agents.router(host, store))
    app.include_router(health.router(host, store))
    app.include_router(metrics.router(measured))
    return app
