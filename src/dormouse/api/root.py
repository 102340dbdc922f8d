"""What a server is, said to those who look: at `/`, and where Claude Code asks when it starts."""

from __future__ import annotations

from fastapi import APIRouter

import dormouse


def router() -> APIRouter:
    """`/` and `/api/hello`, cheap, also for HEAD."""
    routes = APIRouter()

    @routes.head("/", include_in_schema=False)
    @routes.get("/")
    async def root() -> dict[str, str]:
        """Name, version, and where things are."""
        return {
            "name": "dormouse",
            "version": dormouse.__version__,
            "api": "/v1",
            "health": "/health",
            "admin": "/admin/state",
            "docs": "/docs",
        }

    @routes.head("/api/hello", include_in_schema=False)
    @routes.get("/api/hello")
    async def hello() -> dict[str, str]:
        """Somebody is here."""
        return {"message": "hello"}

    return routes
