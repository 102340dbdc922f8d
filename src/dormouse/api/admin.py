"""For those who run the server: what it does, which models there are, and which one it serves."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from typing import Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

import dormouse
from dormouse.api.bodies import JsonRoute
from dormouse.api.caller import CallerParam
from dormouse.api.health import diagnose
from dormouse.api.services import Services
from dormouse.domain.errors import Forbidden
from dormouse.models.folder import ModelFolder
from dormouse.models.host import ModelHost

DEFAULT_DRAIN_S = 30.0
MAX_DRAIN_S = 3600.0


class SwapBody(BaseModel):
    """Which model to serve, and how long requests of the present one may go on, in seconds."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1)
    timeout_s: float = Field(DEFAULT_DRAIN_S, ge=0, le=MAX_DRAIN_S, allow_inf_nan=False)


async def require_admin(caller: CallerParam) -> None:
    """Raises Forbidden unless the caller may administer."""
    if not caller.is_admin:
        raise Forbidden("this key may not administer the server; use one with the admin scope")


def router(services: Services) -> APIRouter:
    """The routes, for admins only."""
    routes = APIRouter(prefix="/admin", dependencies=[Depends(require_admin)], route_class=JsonRoute)
    started = time.monotonic()
    host, store = services.host, services.store

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The models of this machine."""
        folders = await asyncio.to_thread(host.models)
        return {"object": "list", "data": [_model(folder, host) for folder in folders]}

    @routes.post("/models/swap")
    async def swap(body: SwapBody) -> dict[str, Any]:
        """Serve another model; answers when the one before has gone."""
        change = await host.swap(body.model, body.timeout_s)
        return {"object": "model.swap", "model": host.served.name, **change.describe()}

    @routes.get("/state")
    async def state() -> dict[str, Any]:
        """Everything there is to see, in one document."""
        diagnosis = diagnose(services)
        engine = host.served.engine if host.has_started else None
        return {
            "name": "dormouse",
            "version": dormouse.__version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - started, 1),
            "status": diagnosis.status,
            "reasons": diagnosis.reasons,
            "host": host.describe(),
            "engine": None if engine is None else dataclasses.asdict(engine.stats()),
            "queue": None
            if engine is None
            else {"open": engine.num_open, "bound": engine.max_open, "busy_s": round(engine.busy_s, 3)},
            "store": dataclasses.asdict(store.stats()),
        }

    return routes


def _model(folder: ModelFolder, host: ModelHost) -> dict[str, Any]:
    return {
        "id": folder.name,
        "object": "model",
        "type": str(folder.config.get("model_type", "?")),
        "weights_bytes": folder.weights_nbytes,
        "path": str(folder.path),
        "served": host.is_serving and folder.name == host.served.name,
    }
