"""Agents from outside: what waits for the writer to create, fork, tag, roll back and configure them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from dormouse.domain.agents import Agent, AgentId, Checkpoint, check_agent_name
from dormouse.domain.blocks import BlockKey, Namespace
from dormouse.store.agent_book import AgentBook
from dormouse.store.view import StoreView, not_found

ADMIN_TIMEOUT_S = 30.0

T = TypeVar("T")


class Run(Protocol):
    """Runs an action on the writer thread and waits, up to `timeout_s` seconds, for what it returns."""

    def __call__(self, action: Callable[[], T], timeout_s: float) -> T:
        """Raises what the action raises, DeadlineExceeded, and StoreError when it could not be written."""


class AgentAdmin:
    """Everything but the answers from memory waits, `ADMIN_TIMEOUT_S` at most, and is durable on return.

    Without a namespace the last used agent of that name is meant. All may raise DeadlineExceeded, and
    StoreError when it could not be written; then nothing has changed.
    """

    def __init__(self, view: StoreView, book: AgentBook, run: Run) -> None:
        self._view = view
        self._book = book
        self._run = run

    def create(
        self,
        id: AgentId,
        model: str,
        *,
        documents: Mapping[str, bytes] | None = None,
        pinned: bool = False,
        quota_nbytes: int = 0,
    ) -> Agent:
        """An agent that has said nothing yet, with its documents by kind.

        Raises AgentExists when the tenant has one of that name, InvalidRequest, and DocumentsFull.
        """
        check_agent_name(id.name)
        (id.tenant + model).encode()
        return self._wait(
            lambda: self._book.create(
                id, model, documents=documents or {}, pinned=pinned, quota_nbytes=quota_nbytes
            )
        )

    def fork(
        self,
        tenant: str,
        name: str,
        target: str,
        *,
        tag: str | None = None,
        namespace: Namespace | None = None,
    ) -> Agent:
        """A new agent that continues from where `name` is, or was at its checkpoint `tag`.

        Its blocks are the same ones; what is copied are its documents. Of an agent that is just replying
        the last saved state counts. Raises AgentNotFound, CheckpointNotFound, AgentExists, InvalidRequest.
        """
        check_agent_name(target)
        return self._wait(lambda: self._book.fork(self._named(tenant, name, namespace), name, target, tag))

    def configure(
        self,
        tenant: str,
        name: str,
        *,
        pinned: bool | None = None,
        quota_nbytes: int | None = None,
        namespace: Namespace | None = None,
    ) -> None:
        """Pin an agent, bound its bytes (0: no bound); None leaves as it is. Without a namespace, all of
        that name. Raises AgentNotFound."""
        self._wait(
            lambda: self._book.configure(
                self._named(tenant, name, namespace), name, pinned=pinned, quota_nbytes=quota_nbytes
            )
        )

    def tag(self, tenant: str, name: str, tag: str, namespace: Namespace | None = None) -> Checkpoint:
        """Name the agent's state. Raises AgentNotFound, InvalidRequest, AgentExists for a taken tag."""
        return self._wait(lambda: self._book.tag(self._named(tenant, name, namespace), name, tag))

    def tags(self, tenant: str, name: str, namespace: Namespace | None = None) -> list[Checkpoint]:
        """The checkpoints, the oldest first; from memory. Raises AgentNotFound."""
        ids = self._named(tenant, name, namespace)
        if not ids:
            raise not_found(name)
        found = [agent for agent in map(self._view.agent, ids) if agent is not None]
        newest = max(found, key=lambda agent: agent.used_at)
        return self._view.checkpoints(newest.id)

    def untag(self, tenant: str, name: str, tag: str, namespace: Namespace | None = None) -> None:
        """Delete a checkpoint. Raises AgentNotFound and CheckpointNotFound."""
        self._wait(lambda: self._book.untag(self._named(tenant, name, namespace), name, tag))

    def rollback(self, tenant: str, name: str, tag: str, namespace: Namespace | None = None) -> Agent:
        """Put the agent back to a checkpoint, which stays. Raises AgentNotFound and CheckpointNotFound."""
        return self._wait(lambda: self._book.rollback(self._named(tenant, name, namespace), name, tag))

    def own_chain(self, id: AgentId) -> list[BlockKey]:
        """Blocks of the agent that no other agent has, first to last. Raises AgentNotFound."""
        return self._view.own_chain(id)

    def _named(self, tenant: str, name: str, namespace: Namespace | None) -> list[AgentId]:
        return self._view.named(tenant, name, namespace)

    def _wait(self, action: Callable[[], T]) -> T:
        return self._run(action, ADMIN_TIMEOUT_S)
