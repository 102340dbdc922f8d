"""The store: what the engine and the admin surface call. Only what says so waits for the disk."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO, TypeVar

from dormouse.domain.agents import Agent, AgentId, AgentUpdate, check_agent_name
from dormouse.domain.blocks import (
    ROOT,
    BlockKey,
    Link,
    Namespace,
    pack_tokens,
    packed_block_key,
)
from dormouse.domain.cache_spec import CacheSpec
from dormouse.domain.errors import DeadlineExceeded, StoreError
from dormouse.store.agent_admin import ADMIN_TIMEOUT_S, AgentAdmin
from dormouse.store.agent_book import AgentBook
from dormouse.store.audit import VerifyReport, verify
from dormouse.store.clock import SteadyClock
from dormouse.store.disk_watch import Disk, DiskWatch
from dormouse.store.encryption import require_owner
from dormouse.store.file_ops import FileOps
from dormouse.store.files import BlockFormat
from dormouse.store.health import HealthReason
from dormouse.store.identity import Identity, identity_document
from dormouse.store.keeper import Removal
from dormouse.store.lock import FolderLock
from dormouse.store.master_key import KeySource
from dormouse.store.notebook import Notebook, packed
from dormouse.store.opening import StoreParts, open_parts
from dormouse.store.options import StoreOptions, StoreStats
from dormouse.store.read_ahead import ReadAhead
from dormouse.store.reader import BlockReader
from dormouse.store.reader_pool import Done, Load, ReaderPool
from dormouse.store.rows import BlockRow
from dormouse.store.scratch import scratch_file
from dormouse.store.view import PendingBlock, UnsavedAgent, not_found
from dormouse.store.writer import Writer

T = TypeVar("T")

log = logging.getLogger(__name__)


class BlockStore:
    """Durable blocks and agents of one data folder.

    Four kinds of threads meet here: callers (answers from memory, work through queues), one writer, a few
    readers, and one that reads ahead. Callbacks run on the store's threads and must neither block nor call
    what waits (`flush`, `close`, admin writes).
    """

    def __init__(
        self, lock: FolderLock, parts: StoreParts, options: StoreOptions, clock: Callable[[], float]
    ) -> None:
        """Use `open`."""
        self._lock = lock
        self._parts = parts
        self._view = parts.view
        self._clock = clock
        self._formats: dict[Namespace, BlockFormat] = {}
        self._closing = Lock()
        self._is_closed = False
        self._writer = Writer(
            parts.keeper,
            parts.view,
            parts.notes,
            parts.counters,
            parts.health,
            max_batch_nbytes=options.bounds(parts.keeper.quota_nbytes).batch_nbytes,
            retry_s=options.retry_s,
            touch_interval_s=options.touch_interval_s,
        )
        self._reader = BlockReader(
            parts.layout, parts.codec, parts.view, self._formats, parts.counters, self._set_aside
        )
        self._readers = ReaderPool(self._reader, options.num_readers)
        self._read_ahead = ReadAhead(parts.layout, parts.view)
        self._disk = DiskWatch(self._see_disk)
        self._identities: dict[Namespace, Identity] = {}
        self.notebook = Notebook(parts, self._run, self._writer.wake, clock)
        book = AgentBook(parts.keeper, parts.index, parts.view, parts.notes, self.notebook.read, clock)
        self.admin = AgentAdmin(self, parts, book, self._run, clock)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        quota_nbytes: int,
        options: StoreOptions | None = None,
        file_ops: FileOps | None = None,
        clock: Callable[[], float] = time.time,
        key_source: KeySource | None = None,
    ) -> BlockStore:
        """Own the data folder and make its files and catalog agree. `quota_nbytes` bounds all of it.

        With a `key_source` it is encrypted. Raises StoreLocked when another process owns it, StoreTooNew when
        a newer version wrote it, EncryptionMismatch when it is encrypted otherwise than asked for, and
        StoreError when it cannot be used.
        """
        options = options or StoreOptions()
        steady = SteadyClock(clock)
        bounds = options.bounds(quota_nbytes)
        lock, parts = open_parts(folder, file_ops or FileOps(), bounds, steady(), key_source)
        return cls(lock, parts, options, steady)

    @property
    def folder(self) -> Path:
        """The data folder."""
        return self._parts.layout.root

    @property
    def is_encrypted(self) -> bool:
        """Whether what is written is encrypted."""
        return self._parts.vault is not None

    @property
    def quota_nbytes(self) -> int:
        """Bound on all bytes below the data folder."""
        return self._parts.keeper.quota_nbytes

    def register(
        self,
        namespace: Namespace,
        cache: CacheSpec,
        fingerprint: str | None = None,
        *,
        tenant: str | None = None,
    ) -> None:
        """Say what the blocks of a namespace look like, of which model they are, and whose.

        The model is remembered, for `identity`. An encrypted store takes nothing of a namespace whose tenant
        it was never told. Raises ValueError for a second, different answer.
        """
        if self._parts.vault is not None and tenant is not None:
            self._parts.vault.own(namespace, tenant)
        known = self._formats.setdefault(namespace, BlockFormat(cache))
        if known.cache != cache:
            raise ValueError(f"namespace {namespace.hex()} is registered with another cache")
        if fingerprint is None or namespace in self._identities:
            return
        self._identities[namespace] = identity = Identity(fingerprint, cache)
        document = identity_document(namespace)
        if not self.notebook.has(document):
            self.notebook.put(document.tenant, document.kind, document.id, identity.to_json())

    def identity(self, namespace: Namespace) -> Identity | None:
        """Model and format of a namespace, None when it was never registered with its model.

        Waits for the writer at the first time. Raises as `Notebook.get` does.
        """
        if namespace not in self._identities:
            document = identity_document(namespace)
            body = self.notebook.get(document.tenant, document.kind, document.id)
            if body is None:
                return None
            self._identities[namespace] = Identity.from_json(body)
        return self._identities[namespace]

    def contains(self, key: BlockKey) -> bool:
        """Whether the block's KV can be loaded: on disk, or waiting to be written."""
        return self._view.contains(key)

    def has_durable(self, key: BlockKey) -> bool:
        """Whether the block's KV is on disk."""
        return self._view.has_durable(key)

    def children(self, namespace: Namespace, parent: BlockKey, first_token: int) -> list[Link]:
        """Loadable blocks right after `parent` that begin with `first_token`."""
        return self._view.children(namespace, parent, pack_tokens([first_token]))

    def load(self, key: BlockKey, into: memoryview, done: Done) -> None:
        """Read a block's payload into `into` (writable, `block_nbytes` long) on a reader thread.

        `done` is called there, once: with None when `into` holds the verified payload, else with the
        error (BlockMissing when the block is not stored, DamagedBlock when it was and is now
        quarantined) and `into` undefined. Raises ValueError when the namespace is not registered or
        `into` has another size, and StoreError after `close` and while no read returns.
        """
        found = self._view.find(key)
        buffer = into.cast("B")
        if found is not None and len(buffer) != self._format(found.namespace).cache.block_nbytes:
            raise ValueError(f"buffer of {len(buffer)} bytes is not a page")
        self._readers.submit(Load(key, buffer, done))

    def relieve_readers(self, waited_s: float) -> None:
        """Loads have been waited for in vain, for `waited_s` seconds: let them hold up no others."""
        self._readers.relieve(waited_s)

    def read_ahead(self, keys: Iterable[BlockKey]) -> None:
        """The blocks will be loaded soon: have the system read their files. A hint, which may be dropped."""
        self._read_ahead.submit(keys)

    def put(self, namespace: Namespace, link: Link, payload: bytes) -> bool:
        """Queue a block to be written. False when it was refused: the queue is full, or nothing is written.

        A refused block costs durability only. True without doing anything when the block is here
        already. Raises ValueError when payload or link do not fit the namespace.
        """
        block_format = self._format(namespace)
        require_owner(self._parts.vault, namespace)
        cache = block_format.cache
        if len(payload) != cache.block_nbytes:
            raise ValueError(f"payload of {len(payload)} bytes; a page has {cache.block_nbytes}")
        if not 0 < len(link.tokens) <= cache.block_size:
            raise ValueError(f"block of {len(link.tokens)} tokens; block size is {cache.block_size}")
        if self._view.contains(link.key):
            return True
        tokens = _packed(namespace, link)
        block = PendingBlock(namespace, link, tokens, payload, block_format, self._clock())
        return self._writer.put(block)

    def save_agent(self, update: AgentUpdate, on_durable: Callable[[bool], None] | None = None) -> None:
        """Queue an agent's newest state, after everything put before.

        `on_durable` is called once, on the writer thread: True when the update is on disk; False when that
        failed, then it is kept in memory and tried again until it succeeds. Raises ValueError when
        `update.links` is not a chain or a text no Unicode, InvalidRequest when its name is none.
        """
        check_agent_name(update.id.name)
        (update.id.tenant + update.model).encode()  # What is no Unicode fails here, not in the writer.
        rest = packed(update.rest)
        parent = ROOT
        for link in update.links:
            if link.parent != parent or not link.tokens:
                raise ValueError("links of an agent are not a chain from the root")
            if not self._view.knows(link.key):
                _packed(update.id.namespace, link)
            parent = link.key
        if self._parts.vault is not None:
            self._parts.vault.own(update.id.namespace, update.id.tenant)
        now = self._clock()
        self._view.touch((link.key for link in update.links), now)
        self._writer.save(UnsavedAgent(update, rest, now, on_durable))

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """The blocks were used: they are evicted later."""
        if self._view.touch(keys, self._clock()):
            self._writer.wake()

    def agents(self, tenant: str | None = None) -> list[Agent]:
        """Agents of a tenant, or all; the last used first."""
        ids = [one for one in self._view.agent_ids() if tenant is None or one.tenant == tenant]
        found = [agent for agent in map(self._view.agent, ids) if agent is not None]
        return sorted(found, key=lambda agent: agent.used_at, reverse=True)

    def agent(self, tenant: str, name: str, namespace: Namespace | None = None) -> Agent:
        """The agent of that name; without a namespace, the last used one. Raises AgentNotFound."""
        found = [self._view.agent(one) for one in self._view.named(tenant, name, namespace)]
        newest = max((a for a in found if a is not None), key=lambda agent: agent.used_at, default=None)
        if newest is None:
            raise not_found(name)
        return newest

    def history(self, id: AgentId) -> list[int]:
        """All tokens of an agent. Raises AgentNotFound, and StoreError when a part is lost."""
        return self._view.history(id)

    def chain(self, id: AgentId) -> list[BlockKey]:
        """Keys of an agent's blocks, with or without payload. Raises AgentNotFound."""
        return self._view.chain(id)

    def delete_agent(
        self,
        tenant: str,
        name: str,
        namespace: Namespace | None = None,
        *,
        timeout_s: float = ADMIN_TIMEOUT_S,
    ) -> Removal:
        """Delete an agent, its history, and the blocks that no other agent reaches. Waits.

        Without a namespace, all agents of that name go. Raises AgentNotFound, DeadlineExceeded,
        and StoreError when it could not be written.
        """

        def delete() -> Removal:
            return self._parts.keeper.delete_agents(self._view.named(tenant, name, namespace), name)

        return self._run(delete, timeout_s)

    def set_pinned(
        self,
        tenant: str,
        name: str,
        pinned: bool,
        namespace: Namespace | None = None,
    ) -> None:
        """Pinned agents lose their blocks last. Waits; names and errors as in `delete_agent`."""

        self.admin.configure(tenant, name, pinned=pinned, namespace=namespace)

    def scratch(self) -> BinaryIO:
        """A file of the data folder without a name, which goes when it is closed; what is written there is
        encrypted if the store is. Raises OSError."""
        return scratch_file(self.folder, encrypted=self.is_encrypted)

    def gc(self, unused_for_s: float = 0.0, timeout_s: float = ADMIN_TIMEOUT_S) -> Removal:
        """Remove blocks and history that no agent reaches, unused for that many seconds. Waits."""
        used_before = self._clock() - unused_for_s
        return self._run(lambda: self._parts.keeper.collect(used_before), timeout_s)

    def verify(self, timeout_s: float = ADMIN_TIMEOUT_S) -> VerifyReport:
        """Derive every checksum and key again; what is damaged is quarantined.

        Reads all of the store on the calling thread, then waits up to `timeout_s` for the quarantine.
        """
        parts = self._parts
        report = verify(parts.layout, parts.codec, self._view, self._formats, self._reader.damaged)
        self.flush(timeout_s)
        return report

    def stats(self) -> StoreStats:
        """Sizes and counts."""
        ledger = self._parts.ledger
        num_pending, pending_nbytes = self._view.pending
        num_blocks, num_history_only, num_agents = self._view.sizes()
        return StoreStats(
            num_blocks=num_blocks,
            num_history_only=num_history_only,
            num_agents=num_agents,
            num_unsaved_agents=self._view.num_unsaved,
            num_pending=num_pending,
            pending_nbytes=pending_nbytes,
            nbytes=ledger.total,
            blocks_nbytes=ledger.blocks,
            catalog_nbytes=ledger.catalog,
            quarantine_nbytes=ledger.quarantine,
            quota_nbytes=self._parts.keeper.quota_nbytes,
            encrypted=self.is_encrypted,
            counts=self._parts.counters.snapshot(),
            notes=self._parts.findings,
        )

    def look_at_disk(self) -> Disk | None:
        """What the disk is like; None when it has not answered for seconds. Waits for moments only.

        Raises OSError when the data folder cannot be looked at.
        """
        return self._disk.look()

    @property
    def write_s(self) -> float:
        """Seconds that the writer has been at one batch; 0 while it has none."""
        return self._writer.busy_s

    def health(self) -> tuple[HealthReason, ...]:
        """Why saving does not work as it should; empty when it does."""
        return self._parts.health.reasons

    def flush(self, timeout_s: float = ADMIN_TIMEOUT_S) -> bool:
        """Wait until all that was accepted is on disk; what failed is tried again. False when it is not."""
        try:
            return self._run(self._is_saved, timeout_s)
        except (StoreError, DeadlineExceeded):
            return False

    def check(self) -> None:
        """Raise AssertionError when memory contradicts itself. Cheap enough for idle moments."""
        self._view.check()
        self._parts.notes.documents.check()
        self._parts.notes.replies.check()

    def close(self) -> None:
        """Write what is queued, end all threads, unlock. Waits; a second call does nothing."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            self._read_ahead.stop()
            self._readers.stop()
            if not self._writer.stop():
                log.critical("a write does not return; what was queued behind it is lost")
                return  # the catalog and the lock are the writer's, until the process ends
            num_blocks, _ = self._view.pending
            if self._view.num_unsaved or num_blocks:
                log.error(
                    "closed with %d agents and %d blocks that could not be saved",
                    self._view.num_unsaved,
                    num_blocks,
                )
            self._parts.catalog.close()
            self._lock.release()

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, action: Callable[[], T], timeout_s: float) -> T:
        try:
            return self._writer.run(action, timeout_s)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"could not be written: {error}") from error

    def _see_disk(self) -> Disk:
        free = shutil.disk_usage(self._parts.layout.root).free
        return Disk(free, self._parts.catalog.is_in_place)

    def _is_saved(self) -> bool:
        keeper = self._parts.keeper
        if keeper.has_leftovers:
            keeper.settle()
        return not keeper.has_leftovers and not self._parts.health.reasons

    def _set_aside(self, row: BlockRow) -> None:
        self._writer.post(lambda: self._parts.keeper.set_aside(row))

    def _format(self, namespace: Namespace) -> BlockFormat:
        if namespace not in self._formats:
            raise ValueError(f"namespace {namespace.hex()} is not registered")
        return self._formats[namespace]


def _packed(namespace: Namespace, link: Link) -> bytes:
    """The packed tokens of a link whose key follows from them. Raises ValueError."""
    tokens = packed(link.tokens)
    if packed_block_key(namespace, link.parent, tokens) != link.key:
        raise ValueError(f"key {link.key.hex()} does not follow from its parent and tokens")
    return tokens
