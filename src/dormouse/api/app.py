"""The application: routes over one served model and its store."""

from __future__ import annotations

from fastapi import FastAPI

import dormouse
from dormouse.api import admin, agents, errors, health, openai, root
from dormouse.api.limits import BodyLimit
from dormouse.models.host import ModelHost
from dormouse.store.block_store import BlockStore


def create_app(host: ModelHost, store: BlockStore, *, max_body_nbytes: int) -> FastAPI:
    """All routes, each error in its envelope, bodies bounded."""
    app = FastAPI(title="Dormouse", version=dormouse.__version__)
    app.add_middleware(BodyLimit, max_nbytes=max_body_nbytes)
    errors.install(app)
    app.include_router(openai.router(host))
    app.include_router(agents.router(host, store))
    app.include_router(health.router(host, store))
    app.include_router(admin.router(host, store))
    app.include_router(root.router())
    return app
