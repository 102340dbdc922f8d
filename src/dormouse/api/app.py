"""The application: the routes of all dialects over one host of models and its store, behind the edge."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import anyio.lowlevel
from fastapi import FastAPI

import dormouse
from dormouse.api import (
    admin,
    agents,
    anthropic,
    chat,
    completions,
    edge,
    errors,
    health,
    metrics,
    models,
    responses,
    root,
)
from dormouse.api.services import Services
from dormouse.models.host import ModelHost
from dormouse.models.reply_memory import ReplyMemory
from dormouse.store.block_store import BlockStore


def create_app(
    host: ModelHost, store: BlockStore, *, max_body_nbytes: int, around: edge.Edge | None = None
) -> FastAPI:
    """All routes, each error in its envelope, bodies bounded. `around` is who may come in and who watches;
    by default everybody, and nobody."""
    around = around or edge.Edge()
    services = Services(host, store, ReplyMemory(store))
    measured = metrics.Metrics(services, around.limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await anyio.lowlevel.checkpoint()  # brings its event loop's part: not on the first request's time
        yield
        services.prompts.close()
        services.grammars.close()

    app = FastAPI(title="Dormouse", version=dormouse.__version__, lifespan=lifespan)
    larger = {f"{agents.PREFIX}/import": store.quota_nbytes}
    edge.install(app, around, measured, max_body_nbytes=max_body_nbytes, larger=larger)
    errors.install(app)
    for dialect in (anthropic, chat, completions, responses, models):
        app.include_router(dialect.router(services))
    app.include_router(agents.router(services))
    app.include_router(health.router(services))
    app.include_router(admin.router(services))
    app.include_router(metrics.router(measured))
    app.include_router(root.router())
    return app
