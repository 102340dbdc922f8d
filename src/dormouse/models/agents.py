"""Agents as a server has them: in the store, and right now in an engine's arena. Blocking; for threads."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import BinaryIO

from dormouse.domain.agents import Agent, AgentId
from dormouse.domain.errors import AgentBusy, AgentNotFound, Unavailable
from dormouse.engine.engine import Engine
from dormouse.models.served import ServedModel
from dormouse.store.block_store import BlockStore
from dormouse.store.identity import Identity

FLUSH_TIMEOUT_S = 20.0


class AgentState(StrEnum):
    """Where an agent's KV is."""

    AWAKE = "awake"
    """All of it in memory."""
    DOZING = "dozing"
    """A part of it in memory."""
    ASLEEP = "asleep"
    """None of it in memory."""


class Agents:
    """The agents of all tenants beside one served model. Waits, tens of seconds at most.

    `leaving` are engines of models that were swapped out and still reply.
    """

    def __init__(self, served: ServedModel, store: BlockStore, leaving: Sequence[Engine] = ()) -> None:
        self._engine: Engine = served.engine
        self._leaving = leaving
        self._model = served.name
        self._store = store

    @property
    def identity(self) -> Identity:
        """The served model and its format."""
        runtime = self._engine.runtime
        return Identity(runtime.spec.fingerprint, runtime.cache)

    def state(self, agent: Agent) -> AgentState:
        """Whether its blocks are in memory. Raises AgentNotFound."""
        keys = self._store.chain(agent.id)
        num_resident = sum(self._engine.is_resident(key) for key in keys)
        if num_resident == 0:
            return AgentState.ASLEEP
        return AgentState.AWAKE if num_resident == len(keys) else AgentState.DOZING

    def create(
        self, tenant: str, name: str, documents: Mapping[str, bytes], *, pinned: bool, quota_nbytes: int
    ) -> Agent:
        """An agent of the served model. Raises as `AgentAdmin.create` does."""
        identity = self.identity
        new = AgentId(tenant, name, identity.namespace(tenant))
        self._store.register(new.namespace, identity.cache, identity.fingerprint, tenant=tenant)
        return self._store.admin.create(
            new, self._model, documents=documents, pinned=pinned, quota_nbytes=quota_nbytes
        )

    def sleep(self, tenant: str, name: str) -> int:
        """Give the agent's pages back; how many were. Its words do not change by it.

        Blocks that are not on disk are written first; those that cannot be, that are in use, or that other
        agents have too, stay. Raises AgentNotFound.
        """
        keys = self._store.admin.own_chain(self._store.agent(tenant, name).id)
        self._engine.offer(keys)
        self._store.flush(FLUSH_TIMEOUT_S)
        return self._engine.release(keys)

    def wake(self, tenant: str, name: str) -> int:
        """Have the system read the agent's blocks that are on disk only; how many. A hint: nobody waits.

        No page is taken for them, so nobody is pushed out; no more are read than the arena holds. Raises
        AgentNotFound.
        """
        keys = self._store.chain(self._store.agent(tenant, name).id)
        missing = [key for key in keys if not self._engine.is_resident(key) and self._store.has_durable(key)]
        ahead = missing[: self._engine.runtime.num_pages]
        self._store.read_ahead(ahead)
        return len(ahead)

    def rollback(self, tenant: str, name: str, tag: str) -> Agent:
        """Put the agent back to a checkpoint. Raises AgentBusy while it replies, and as the store does."""
        if any(engine.num_replies(tenant, name) for engine in (self._engine, *self._leaving)):
            raise AgentBusy(f"agent {name!r} is replying; roll it back when it has finished", param="agent")
        return self._store.admin.rollback(tenant, name, tag)

    def load(self, file: BinaryIO, nbytes: int, tenant: str, *, name: str | None, overwrite: bool) -> Agent:
        """Import an agent of the served model. Raises as `AgentAdmin.load` does."""
        return self._store.admin.load(
            file, nbytes, tenant, name=name, expected=self.identity, overwrite=overwrite
        )

    def delete(self, tenant: str, name: str) -> None:
        """Forget an agent: on disk, in memory, and a reply that it is giving. Raises AgentNotFound.

        Blocks that other agents have too stay.
        """
        abandoned = self._engine.abandon(tenant, name)
        for engine in self._leaving:
            with contextlib.suppress(Unavailable):  # one that has just ended replies to nobody
                if (more := engine.abandon(tenant, name)) is not None:
                    abandoned = [*(abandoned or []), *more]
        try:
            gone = set(self._store.delete_agent(tenant, name).keys)
        except AgentNotFound:
            if abandoned is None:
                raise
            gone = set()
        said = abandoned or []
        gone |= self._store.admin.discard(said).keys
        # What was never stored is in nobody's history either.
        gone.update(key for key in said if not self._store.contains(key))
        self._engine.forget(gone)

    def states(self, agents: list[Agent]) -> list[tuple[Agent, AgentState]]:
        """Each with its state; one that is deleted meanwhile is left out."""
        found = []
        for agent in agents:
            with contextlib.suppress(AgentNotFound):
                found.append((agent, self.state(agent)))
        return found
