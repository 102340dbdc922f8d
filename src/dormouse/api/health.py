"""Whether the server serves, and what keeps it from serving well."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from dormouse.models.host import ModelHost
from dormouse.store.block_store import BlockStore

_FULL_ARENA = 0.9


def router(host: ModelHost, store: BlockStore) -> APIRouter:
    """`/health`: 200 while requests are answered, `degraded` included; 503 when they are not."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> JSONResponse:
        """State, reasons and counts."""
        served = host.served
        engine = served.engine
        stats = engine.stats()
        reasons = [{"code": reason.code, "message": reason.text} for reason in store.health()]
        if stats.pages_used > _FULL_ARENA * stats.pages_total:
            reasons.append({"code": "arena_full", "message": "over 90% of the arena is in use"})
        state = "degraded" if reasons else "ok"
        if engine.is_stopping:
            state = "draining"
        if engine.death is not None:
            state = "dead"
            reasons.append({"code": "engine_dead", "message": str(engine.death)})
        body: dict[str, Any] = {
            "status": state,
            "reasons": reasons,
            "model": served.name,
            "engine": dataclasses.asdict(stats),
            "memory": {
                "weights_nbytes": engine.runtime.weights_nbytes,
                "arena_nbytes": stats.pages_total * engine.runtime.cache.block_nbytes,
            },
        }
        return JSONResponse(body, 200 if state in ("ok", "degraded") else 503)

    return routes
