"""The list of models, in a form that the clients of every dialect can read."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter

from dormouse.api.services import Services
from dormouse.domain.errors import InvalidRequest, ModelNotFound
from dormouse.models.served import ServedModel


def router(services: Services) -> APIRouter:
    """The routes, and what is refused by name because no model here does it."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """What a request may name: OpenAI's list, Anthropic's page, and the `models` that Codex reads."""
        served = services.host.served
        names = await asyncio.to_thread(services.host.names)
        others = [_named(name) for name in names if name != served.name]
        data = [_model(served), *others]
        page = {"has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}
        return {"object": "list", "data": data, **page, "models": [_codex_model(served)]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        # Not `serve`: to look at a model is no reason to swap to it.
        meant, served = services.host.model_of(name), services.host.served
        if meant != served.name:
            raise ModelNotFound(
                f"model '{meant}' is on this machine but not served now; a request for it brings it",
                param="model",
            )
        return _model(served)

    @routes.post("/embeddings")
    async def embeddings() -> None:
        """Refused: models here generate text."""
        raise InvalidRequest("embeddings are not served here; this server generates text", param="model")

    return routes


def _model(served: ServedModel) -> dict[str, Any]:
    created = datetime.fromtimestamp(served.created, UTC)
    return {
        **_named(served.name),
        "created": served.created,
        "created_at": created.isoformat(timespec="seconds"),
        "runtime": served.engine.runtime.name,
        "context_length": served.engine.max_length,
        "max_input_tokens": served.engine.max_length,
    }


def _named(name: str) -> dict[str, Any]:
    """A model that would be loaded for a request; what it holds is known then."""
    created = {"created": 0, "created_at": "1970-01-01T00:00:00+00:00"}
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "display_name": name,
        **created,
        "owned_by": "dormouse",
    }


def _codex_model(served: ServedModel) -> dict[str, Any]:
    return {
        "slug": served.name,
        "display_name": served.name,
        "context_window": served.engine.max_length,
        "supported_reasoning_levels": [],
    }
