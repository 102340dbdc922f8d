"""Whose turn it is with an agent: one after the other, be it to say something, to fork or to roll back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from weakref import WeakValueDictionary

from dormouse.domain.errors import AgentBusy

_WAIT_S = 60.0
"""A turn waits so long for the one before it."""


class Turn:
    """A turn with an agent. `is_void` once the agent was deleted under it: nothing may be kept of it."""

    def __init__(self) -> None:
        self.is_void = False


class Turns:
    """The turns of all agents. Owned by the event loop."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._running: dict[tuple[str, str], Turn] = {}

    @contextlib.asynccontextmanager
    async def take(self, tenant: str, name: str) -> AsyncIterator[Turn]:
        """Wait for the turns before. Raises AgentBusy when they take too long."""
        agent = (tenant, name)
        lock = self._locks.setdefault(agent, asyncio.Lock())
        try:
            await asyncio.wait_for(lock.acquire(), _WAIT_S)
        except TimeoutError:
            raise AgentBusy(
                f"agent '{name}' is still replying; ask again when it has finished", param="agent"
            ) from None
        turn = self._running[agent] = Turn()
        try:
            yield turn
        finally:
            del self._running[agent]
            lock.release()

    def void(self, tenant: str, name: str) -> None:
        """The agent is deleted: what is being said to it is not to be kept."""
        turn = self._running.get((tenant, name))
        if turn is not None:
            turn.is_void = True
