"""Agents and checkpoints as the API shows them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from dormouse.domain.agents import Agent, Checkpoint
from dormouse.models.agents import Agents
from dormouse.models.served import ServedModel
from dormouse.store.block_store import BlockStore


def render_agent(agent: Agent, state: str, store: BlockStore) -> dict[str, Any]:
    """An agent. `state`: awake, dozing (in part) or asleep. Waits for the store."""
    identity = store.identity(agent.id.namespace)
    return {
        "id": agent.id.name,
        "object": "agent",
        "model": agent.model,
        "kv_format": None if identity is None else str(identity.cache.format),
        "state": state,
        "tokens": agent.num_tokens,
        "durable_tokens": agent.durable_tokens,
        "stored_bytes": agent.stored_nbytes,
        "quota_bytes": agent.quota_nbytes,
        "pinned": agent.pinned,
        "forked_from": f"{agent.parent}@{agent.parent_tokens}" if agent.parent else None,
        "checkpoints": agent.num_checkpoints,
        "created_at": iso(agent.created_at),
        "used_at": iso(agent.used_at),
    }


def agent_row(agent: Agent, served: ServedModel, store: BlockStore) -> dict[str, Any]:
    """An agent with its state beside the served model. Waits for the store."""
    return render_agent(agent, str(Agents(served, store).state(agent)), store)


def render_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint."""
    return {
        "name": checkpoint.tag,
        "object": "agent.checkpoint",
        "tokens": checkpoint.num_tokens,
        "created_at": iso(checkpoint.created_at),
    }


def iso(seconds: float) -> str:
    """A Unix time as the API shows it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
