"""Lists of agents in pages: filters, and a cursor that survives what happens between two pages."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

from dormouse.domain.agents import Agent
from dormouse.domain.errors import InvalidRequest
from dormouse.models.agents import Agents, AgentState


@dataclass(frozen=True, slots=True)
class Filter:
    """Which agents are wanted; None for any."""

    state: AgentState | None
    pinned: bool | None
    prefix: str


@dataclass(frozen=True, slots=True)
class Page:
    """Agents with their states, and where the next page starts, None behind the last one."""

    agents: list[tuple[Agent, AgentState]]
    next: str | None


def page(agents: Agents, found: list[Agent], wanted: Filter, limit: int, after: str | None) -> Page:
    """The next `limit` of `found` behind the cursor `after`, the last used first.

    One that is used between two pages moves to the front and is not seen again. Raises InvalidRequest for
    a cursor that is not ours.
    """
    start = _place(after) if after is not None else None
    ordered = sorted(found, key=_order)
    rest = [agent for agent in ordered if start is None or _order(agent) > start]
    matching = [
        agent
        for agent in rest
        if agent.id.name.startswith(wanted.prefix) and wanted.pinned in (None, agent.pinned)
    ]
    rows = [row for row in agents.states(matching) if wanted.state in (None, row[1])]
    more = len(rows) > limit
    return Page(rows[:limit], _cursor(rows[limit - 1][0]) if more else None)


def _order(agent: Agent) -> tuple[float, str, str]:
    return -agent.used_at, agent.id.name, agent.id.namespace.hex()


def _cursor(agent: Agent) -> str:
    return base64.urlsafe_b64encode(json.dumps(_order(agent)).encode()).decode()


def _place(cursor: str) -> tuple[float, str, str]:
    try:
        used_at, name, namespace = json.loads(base64.urlsafe_b64decode(cursor))
        return float(used_at), str(name), str(namespace)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest("`after` is no cursor; send `next` of the page before", param="after") from error
