"""The agents of this server: list, show, delete."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter

from dormouse.api.caller import CallerParam
from dormouse.domain.agents import Agent, check_agent_name
from dormouse.domain.errors import AgentNotFound
from dormouse.models.host import ModelHost
from dormouse.models.served import ServedModel
from dormouse.store.block_store import BlockStore


def router(host: ModelHost, store: BlockStore) -> APIRouter:
    """The routes. Names may hold slashes, so they end a path."""
    routes = APIRouter(prefix="/v1/agents")

    @routes.get("")
    async def list_agents(caller: CallerParam) -> dict[str, Any]:
        """All agents, the last used first."""
        return {"object": "list", "data": await asyncio.to_thread(_rows, host.served, store, caller.tenant)}

    @routes.get("/{name:path}")
    async def show_agent(name: str, caller: CallerParam) -> dict[str, Any]:
        """One agent."""
        name = check_agent_name(name)
        return await asyncio.to_thread(_row, host.served, store, caller.tenant, name)

    @routes.delete("/{name:path}")
    async def delete_agent(name: str, caller: CallerParam) -> dict[str, Any]:
        """Forget an agent: its history, and the blocks that only it has."""
        await asyncio.to_thread(store.delete_agent, caller.tenant, check_agent_name(name))
        return {"id": name, "object": "agent.deleted", "deleted": True}

    return routes


def render_agent(agent: Agent, state: str) -> dict[str, Any]:
    """An agent as the API shows it. `state`: awake, dozing (in part) or asleep."""
    return {
        "id": agent.id.name,
        "object": "agent",
        "model": agent.model,
        "state": state,
        "tokens": agent.num_tokens,
        "durable_tokens": agent.durable_tokens,
        "stored_bytes": agent.stored_nbytes,
        "pinned": agent.pinned,
        "created_at": _iso(agent.created_at),
        "used_at": _iso(agent.used_at),
    }


def _rows(served: ServedModel, store: BlockStore, tenant: str) -> list[dict[str, Any]]:
    rows = []
    for agent in store.agents(tenant):
        # One may be deleted while the others are listed.
        with contextlib.suppress(AgentNotFound):
            rows.append(render_agent(agent, _state(served, store, agent)))
    return rows


def _row(served: ServedModel, store: BlockStore, tenant: str, name: str) -> dict[str, Any]:
    agent = store.agent(tenant, name)
    return render_agent(agent, _state(served, store, agent))


def _state(served: ServedModel, store: BlockStore, agent: Agent) -> str:
    keys = store.chain(agent.id)
    num_resident = sum(served.engine.is_resident(key) for key in keys)
    if num_resident == 0:
        return "asleep"
    return "awake" if num_resident == len(keys) else "dozing"


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
