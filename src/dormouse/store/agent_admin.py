"""Agents from outside: what waits for the writer to create, fork, tag, roll back and configure them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, Protocol, TypeVar

from dormouse.domain.agents import Agent, AgentId, Checkpoint, check_new_agent_name
from dormouse.domain.blocks import BlockKey, Namespace
from dormouse.domain.cache_spec import CacheSpec
from dormouse.domain.errors import StoreError
from dormouse.store.agent_book import AgentBook
from dormouse.store.agent_export import AgentExport
from dormouse.store.agent_import import AgentImport, import_blocks
from dormouse.store.archive import read_archive
from dormouse.store.identity import Identity
from dormouse.store.keeper import Removal
from dormouse.store.opening import StoreParts
from dormouse.store.view import not_found

ADMIN_TIMEOUT_S = 30.0
_QUOTA_SHARE = 0.8
"""An import that takes more of the quota than this would push out everything else."""

T = TypeVar("T")


class Run(Protocol):
    """Runs an action on the writer thread and waits, up to `timeout_s` seconds, for what it returns."""

    def __call__(self, action: Callable[[], T], timeout_s: float) -> T:
        """Raises what the action raises, DeadlineExceeded, and StoreError when it could not be written."""


class Owner(Protocol):
    """The store, as far as an agent's file needs it."""

    def register(
        self,
        namespace: Namespace,
        cache: CacheSpec,
        fingerprint: str | None = None,
        *,
        tenant: str | None = None,
    ) -> None:
        """Say what the blocks of a namespace are, and whose."""

    def identity(self, namespace: Namespace) -> Identity | None:
        """What the blocks of a namespace are."""


class AgentAdmin:
    """Everything but the answers from memory waits, `ADMIN_TIMEOUT_S` at most, and is durable on return.

    Without a namespace the last used agent of that name is meant. All may raise DeadlineExceeded, and
    StoreError when it could not be written; then nothing has changed.
    """

    def __init__(
        self, store: Owner, parts: StoreParts, book: AgentBook, run: Run, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._layout = parts.layout
        self._codec = parts.codec
        self._keeper = parts.keeper
        self._view = parts.view
        self._max_documents_nbytes = parts.notes.documents.bounds.max_nbytes
        self._book = book
        self._run = run
        self._clock = clock

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
        check_new_agent_name(id.name)
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
        check_new_agent_name(target)
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
        found = [agent for agent in map(self._view.agent, ids) if agent is not None]
        if not found:
            raise not_found(name)
        newest = max(found, key=lambda agent: agent.used_at)
        return self._view.checkpoints(newest.id)

    def untag(self, tenant: str, name: str, tag: str, namespace: Namespace | None = None) -> None:
        """Delete a checkpoint. Raises AgentNotFound and CheckpointNotFound."""
        self._wait(lambda: self._book.untag(self._named(tenant, name, namespace), name, tag))

    def rollback(self, tenant: str, name: str, tag: str, namespace: Namespace | None = None) -> Agent:
        """Put the agent back to a checkpoint, which stays. Raises AgentNotFound and CheckpointNotFound."""
        return self._wait(lambda: self._book.rollback(self._named(tenant, name, namespace), name, tag))

    def export(self, tenant: str, name: str, namespace: Namespace | None = None) -> AgentExport:
        """The agent as one file, which is made while it is read. Of an agent that is just replying, the
        last saved state. Raises AgentNotFound, and StoreError when it cannot be told of which model it is.
        """
        snapshot, documents = self._wait(
            lambda: self._book.snapshot(self._named(tenant, name, namespace), name)
        )
        identity = self._store.identity(snapshot.agent.id.namespace)
        if identity is None:
            raise StoreError(
                f"agent {name!r} was made by an older version, which did not note its model; serve "
                f"{snapshot.agent.model!r} and send the agent a message, then export it"
            )
        return AgentExport(self._layout, self._codec, snapshot, identity, documents)

    def load(
        self,
        file: BinaryIO,
        nbytes: int,
        tenant: str,
        *,
        name: str | None = None,
        expected: Identity | None = None,
        overwrite: bool = False,
    ) -> Agent:
        """Import an agent's file of `nbytes`, under `name` or its own. Nothing is written before all of it
        is verified; an error later takes back what was written.

        Raises ArchiveInvalid, ArchiveMismatch when it is not of the `expected` model and format, AgentExists
        for a taken name unless `overwrite`, InvalidRequest, and StoreError when it does not fit the quota.
        """
        archive = read_archive(file, nbytes, self._max_documents_nbytes, expected)
        manifest = archive.manifest
        name = check_new_agent_name(manifest.name if name is None else name)
        if not overwrite:
            self._book.refuse_taken(tenant, name)
        if nbytes > self._keeper.quota_nbytes * _QUOTA_SHARE:
            raise StoreError(
                f"{nbytes} bytes do not fit the disk quota of {self._keeper.quota_nbytes} bytes; raise it"
            )
        identity = manifest.identity
        here = AgentId(tenant, name, identity.namespace(tenant))
        self._store.register(here.namespace, identity.cache, identity.fingerprint, tenant=tenant)
        agent = AgentImport(archive, here, self._clock())
        adoption = agent.adoption()
        return import_blocks(
            self._keeper,
            self._view,
            self._wait,
            agent,
            file,
            lambda: self._book.adopt(adoption, overwrite=overwrite),
        )

    def discard(self, keys: Sequence[BlockKey]) -> Removal:
        """Remove, and overwrite, those blocks that no agent needs."""
        return self._wait(lambda: self._keeper.remove_unreached(keys))

    def own_chain(self, id: AgentId) -> list[BlockKey]:
        """Blocks of the agent that no other agent has, first to last. Raises AgentNotFound."""
        return self._view.own_chain(id)

    def _named(self, tenant: str, name: str, namespace: Namespace | None) -> list[AgentId]:
        return self._view.named(tenant, name, namespace)

    def _wait(self, action: Callable[[], T]) -> T:
        return self._run(action, ADMIN_TIMEOUT_S)
