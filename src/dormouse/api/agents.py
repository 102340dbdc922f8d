"""`/v1/agents`: agents as things to make, look at, change, put to sleep and delete.

Names may hold slashes. A path whose last part is an action (`domain.agents.AGENT_ACTIONS`) is that action of
the agent named by what is before it; every other path is a name. Checkpoints are the one thing with a name
behind the action. No agent is created with a name that would hide an action. Forks, checkpoints and
files are in `agent_actions.py` and `agent_files.py`.
"""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from dormouse.api import agent_actions, agent_files, agent_messages
from dormouse.api.agent_pages import Filter, page
from dormouse.api.agent_rows import agent_row, render_agent
from dormouse.api.bodies import JsonRoute
from dormouse.api.caller import CallerParam
from dormouse.api.services import Services
from dormouse.api.transcripts import SETTINGS
from dormouse.domain.agents import check_agent_name
from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.errors import InvalidRequest
from dormouse.models.agents import Agents, AgentState

PREFIX = "/v1/agents"
MAX_LIMIT = 1000


class AgentBody(BaseModel):
    """A new agent. `system`, `tools` and `settings` are kept for its conversations."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    system: str | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)
    model: str | None = None
    kv_format: KVFormat | None = None
    pinned: bool = False
    quota_bytes: int = Field(0, ge=0, lt=1 << 48)

    def document(self) -> bytes:
        """What is kept of it. Raises InvalidRequest when it is no Unicode."""
        kept = {"system": self.system, "tools": self.tools, "settings": self.settings}
        try:
            return json.dumps(kept, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest("the body has lone surrogates; send valid Unicode") from error


class AgentPatch(BaseModel):
    """What changes; the rest stays. `quota_bytes` 0 is no bound."""

    model_config = ConfigDict(extra="forbid")

    pinned: bool | None = None
    quota_bytes: int | None = Field(None, ge=0, lt=1 << 48)


def router(services: Services) -> APIRouter:
    """All routes below `PREFIX`; actions come first, since a name matches any path."""
    host, store = services.host, services.store
    routes = APIRouter(prefix=PREFIX, route_class=JsonRoute)
    # Each has the whole prefix, and is not given it when included: logs and metrics name the template that
    # a route was made with.
    everything = APIRouter()
    everything.include_router(agent_files.router(host, store, PREFIX))
    everything.include_router(agent_actions.router(services, PREFIX))
    everything.include_router(agent_messages.router(services, PREFIX))

    def one(tenant: str, name: str) -> dict[str, Any]:
        return agent_row(store.agent(tenant, name), host.served, store)

    @routes.get("")
    async def list_agents(
        caller: CallerParam,
        state: AgentState | None = None,
        pinned: bool | None = None,
        prefix: str = "",
        limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 100,
        after: str | None = None,
    ) -> dict[str, Any]:
        """Agents, the last used first; `next` of a page is `after` of the one that follows."""

        def find() -> dict[str, Any]:
            agents = Agents(host.served, store)
            found = page(agents, store.agents(caller.tenant), Filter(state, pinned, prefix), limit, after)
            rows = [render_agent(agent, str(where), store) for agent, where in found.agents]
            return {"object": "list", "data": rows, "has_more": found.next is not None, "next": found.next}

        return await asyncio.to_thread(find)

    @routes.post("", status_code=201)
    async def create_agent(body: AgentBody, caller: CallerParam) -> dict[str, Any]:
        """An agent that has said nothing yet."""
        served = host.served if body.model is None else await host.serve(body.model, caller.tenant)
        served_format = served.engine.runtime.cache.format
        if body.kv_format not in (None, served_format):
            raise InvalidRequest(
                f"agents here are kept as {served_format}; start a server with --kv-format {body.kv_format}",
                param="kv_format",
            )

        def create() -> dict[str, Any]:
            documents = {SETTINGS: body.document()}
            agent = Agents(served, store).create(
                caller.tenant, body.name, documents, pinned=body.pinned, quota_nbytes=body.quota_bytes
            )
            return agent_row(agent, served, store)

        return await asyncio.to_thread(create)

    @routes.get("/{name:path}")
    async def show_agent(name: str, caller: CallerParam) -> dict[str, Any]:
        """One agent."""
        return await asyncio.to_thread(one, caller.tenant, check_agent_name(name))

    @routes.patch("/{name:path}")
    async def change_agent(name: str, body: AgentPatch, caller: CallerParam) -> dict[str, Any]:
        """Pin an agent, or bound its bytes."""

        def change() -> dict[str, Any]:
            store.admin.configure(
                caller.tenant, check_agent_name(name), pinned=body.pinned, quota_nbytes=body.quota_bytes
            )
            return one(caller.tenant, name)

        return await asyncio.to_thread(change)

    @routes.delete("/{name:path}")
    async def delete_agent(name: str, caller: CallerParam) -> dict[str, Any]:
        """Forget an agent: its history, its documents, and the blocks that only it has."""
        services.turns.void(caller.tenant, name)
        await asyncio.to_thread(
            lambda: Agents(host.served, store, host.leaving).delete(caller.tenant, check_agent_name(name))
        )
        services.turns.void(caller.tenant, name)
        services.decisions.forget(caller.tenant, name)
        return {"id": name, "object": "agent.deleted", "deleted": True}

    everything.include_router(routes)
    return everything
