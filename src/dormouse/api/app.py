"""The application: the routes of all dialects over one host of models and its store."""

from __future__ import annotations

from fastapi import FastAPI

import dormouse
from dormouse.api import admin, agents, anthropic, chat, completions, errors, health, models, responses, root
from dormouse.api.limits import BodyLimit
from dormouse.api.services import Services
from dormouse.models.host import ModelHost
from dormouse.store.block_store import BlockStore


def create_app(host: ModelHost, store: BlockStore, *, max_body_nbytes: int) -> FastAPI:
    """All routes, each error in its envelope, bodies bounded."""
    app = FastAPI(title="Dormouse", version=dormouse.__version__)
    larger = {f"{agents.PREFIX}/import": store.quota_nbytes}
    app.add_middleware(BodyLimit, max_nbytes=max_body_nbytes, larger=larger)
    errors.install(app)
    services = Services(host, store)
    for dialect in (anthropic, chat, completions, responses, models):
        app.include_router(dialect.router(services))
    app.include_router(agents.router(host, store))
    app.include_router(health.router(host, store))
    app.include_router(admin.router(host, store))
    app.include_router(root.router())
    return app
