"""What can be done to an agent: fork, checkpoints, roll back, sleep, wake."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from dormouse.api.agent_rows import agent_row, render_checkpoint
from dormouse.api.bodies import JsonRoute
from dormouse.api.caller import CallerParam
from dormouse.api.services import Services
from dormouse.models.agents import Agents


class ForkBody(BaseModel):
    """The fork's name, and the checkpoint that it starts from; without one, the present."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    checkpoint: str | None = None


class CheckpointBody(BaseModel):
    """The checkpoint's name."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)


class RollbackBody(BaseModel):
    """Where the agent goes back to."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str


def router(services: Services, prefix: str) -> APIRouter:
    """The routes; to be included before those that take any path for a name."""
    host, store, turns = services.host, services.store, services.turns
    routes = APIRouter(prefix=prefix, route_class=JsonRoute)

    @routes.post("/{name:path}/fork", status_code=201)
    async def fork(name: str, body: ForkBody, caller: CallerParam) -> dict[str, Any]:
        """A new agent that continues from here, on the same blocks."""

        def make() -> dict[str, Any]:
            agent = store.admin.fork(caller.tenant, name, body.name, tag=body.checkpoint)
            return agent_row(agent, host.served, store)

        async with turns.take(caller.tenant, name):
            return await asyncio.to_thread(make)

    @routes.post("/{name:path}/checkpoints", status_code=201)
    async def make_checkpoint(name: str, body: CheckpointBody, caller: CallerParam) -> dict[str, Any]:
        """Give the present state a name."""
        async with turns.take(caller.tenant, name):
            made = await asyncio.to_thread(store.admin.tag, caller.tenant, name, body.name)
        return render_checkpoint(made)

    @routes.get("/{name:path}/checkpoints")
    async def list_checkpoints(name: str, caller: CallerParam) -> dict[str, Any]:
        """All checkpoints, the oldest first."""
        found = await asyncio.to_thread(store.admin.tags, caller.tenant, name)
        return {"object": "list", "data": [render_checkpoint(checkpoint) for checkpoint in found]}

    @routes.delete("/{name:path}/checkpoints/{tag}")
    async def delete_checkpoint(name: str, tag: str, caller: CallerParam) -> dict[str, Any]:
        """Forget a checkpoint."""
        await asyncio.to_thread(store.admin.untag, caller.tenant, name, tag)
        return {"name": tag, "object": "agent.checkpoint.deleted", "deleted": True}

    @routes.post("/{name:path}/rollback")
    async def rollback(name: str, body: RollbackBody, caller: CallerParam) -> dict[str, Any]:
        """Put the agent back to a checkpoint, which stays."""

        def roll_back() -> dict[str, Any]:
            served = host.served
            agent = Agents(served, store, host.leaving).rollback(caller.tenant, name, body.checkpoint)
            return agent_row(agent, served, store)

        async with turns.take(caller.tenant, name):
            return await asyncio.to_thread(roll_back)

    @routes.post("/{name:path}/sleep")
    async def sleep(name: str, caller: CallerParam) -> dict[str, Any]:
        """Give the agent's memory back now."""

        def put_to_sleep() -> dict[str, Any]:
            served = host.served
            num_pages = Agents(served, store).sleep(caller.tenant, name)
            row = agent_row(store.agent(caller.tenant, name), served, store)
            return {**row, "released_blocks": num_pages}

        return await asyncio.to_thread(put_to_sleep)

    @routes.post("/{name:path}/wake", status_code=202)
    async def wake(name: str, caller: CallerParam) -> dict[str, Any]:
        """The agent will be needed soon: have its blocks read from the disk."""

        def have_read() -> dict[str, Any]:
            served = host.served
            num_blocks = Agents(served, store).wake(caller.tenant, name)
            row = agent_row(store.agent(caller.tenant, name), served, store)
            return {**row, "reading_blocks": num_blocks}

        return await asyncio.to_thread(have_read)

    return routes
