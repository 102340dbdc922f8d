"""Carries changes out in the order that survives a crash: files, commit, index, unlink.

Runs on the writer thread alone (and on the opening thread before that one starts).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from dormouse.domain.agents import AgentId
from dormouse.domain.blocks import BlockKey, Namespace
from dormouse.domain.errors import DamagedCatalog, StoreError
from dormouse.store.batch import plan_batch
from dormouse.store.block_files import BlockFiles, WrittenBlock
from dormouse.store.catalog import Catalog
from dormouse.store.garbage import (
    agent_deletion,
    drop_payload,
    over_quota,
    unreached,
    victims,
)
from dormouse.store.health import WRITE_ERRORS, Health, WriteError
from dormouse.store.index import Index
from dormouse.store.ledger import Count, Counters, Ledger
from dormouse.store.notes import Notes
from dormouse.store.rows import AgentRow, BlockRow, Change, DocumentId, agent_documents
from dormouse.store.unwritten import Unwritten
from dormouse.store.view import PendingBlock, StoreView, UnsavedAgent, not_found

log = logging.getLogger(__name__)

LOW_WATER = 0.95
"""Evictions go on down to this part of the quota, so that they come seldom."""

REMOVAL_BATCH = 32
"""Rows per transaction when many blocks go: their files are freed before the catalog's log grows."""

MAX_UNLINKED = 256
"""So many unlinked files are remembered before their folders are synced and the catalog forgets them."""

CATALOG_ROOM_NBYTES = 128 << 10
ROW_ROOM_NBYTES = 8 << 10
"""How much a transaction and each of its rows may add to the catalog at most: a few pages."""


@dataclass(frozen=True, slots=True)
class Removal:
    """What was removed; `nbytes` of files. `keys` has history without files too."""

    num_blocks: int
    nbytes: int
    keys: frozenset[BlockKey] = frozenset()


class Keeper:
    """The only one that writes: block files through `BlockFiles`, rows through `Catalog`."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        files: BlockFiles,
        index: Index,
        view: StoreView,
        ledger: Ledger,
        counters: Counters,
        health: Health,
        notes: Notes,
        unwritten: Unwritten,
        quota_nbytes: int,
    ) -> None:
        self._catalog = catalog
        self._files = files
        self._index = index
        self._view = view
        self._ledger = ledger
        self._counters = counters
        self._health = health
        self._notes = notes
        self._unwritten = unwritten
        self._quota_nbytes = quota_nbytes
        self._notes_failed = False
        self._catalog_failed = False
        self._files_work = True
        self._dirty: dict[AgentId, UnsavedAgent] = {}
        self._to_trim: set[AgentId] = set()
        self._doomed: dict[BlockKey, Namespace] = {}
        self._to_wipe: set[BlockKey] = set()
        self._unlinked: dict[BlockKey, Namespace] = {}

    @property
    def quota_nbytes(self) -> int:
        """Bytes that all files of the store may take."""
        return self._quota_nbytes

    @property
    def has_leftovers(self) -> bool:
        """Whether something waits for a disk that works: rows, notes, blocks, or files that are to go."""
        return bool(self._catalog_failed or self._notes_failed or self._unwritten or self._doomed)

    @property
    def blocks_are_due(self) -> bool:
        """Whether blocks that the disk did not take are to be tried again now."""
        return self._unwritten.is_due

    @property
    def catalog_failed(self) -> bool:
        """Whether the catalog was not written when it was last tried."""
        return self._catalog_failed

    def commit(self, change: Change) -> None:
        """Commit `change`, mirror it, then unlink what it doomed. Raises as `Catalog.apply` does."""
        stored = {row.key for row in change.rows.values() if row.nbytes}
        # What a write that failed has left may come back by a power cut: it is on record before its row goes.
        left = self._unlinked | self._doomed
        change.doomed |= {key: left[key] for key in change.removed if key in left}
        change.unlinked |= stored | (self._settled() - change.doomed.keys())
        self._catalog.apply(change)
        self._view.apply(change)
        self._notes.apply(change)
        for key in change.unlinked | change.doomed.keys():
            self._doomed.pop(key, None)
            self._to_wipe.discard(key)
            self._unlinked.pop(key, None)
        self._doomed.update(change.doomed)
        if change.wipe:
            self._to_wipe |= change.doomed.keys()
        self._catalog.trim()
        self._ledger.measure_catalog()
        self.unlink_doomed()

    def unlink_doomed(self) -> None:
        """Unlink the files of removed blocks; what fails is tried again later."""
        for key, namespace in list(self._doomed.items()):
            try:
                self._files.unlink(namespace, key, wipe=key in self._to_wipe)
            except OSError as error:
                self._health.failed("removal of files", error)
            else:
                del self._doomed[key]
                self._to_wipe.discard(key)
                self._unlinked[key] = namespace
        if not self._doomed:
            self._health.works("removal of files")

    def store(
        self,
        blocks: Sequence[PendingBlock],
        agents: Sequence[UnsavedAgent],
        used: Mapping[BlockKey, float],
    ) -> bool:
        """Make a batch, and what failed before, durable in one transaction; False when that failed.

        What cannot be written is kept, of each agent the newest update, and written with a later batch, as
        are notes that the quota has no room for. Blocks that it has no room for are dropped.
        """
        again = self._unwritten.take()
        blocks = [*again, *blocks]
        newest = self._dirty | {agent.update.id: agent for agent in agents}
        has_room = self._make_room(blocks, newest.values())
        written = self._write(blocks) if has_room else []
        change = plan_batch(self._index, self._view.unsaved_tips(), written, newest.values(), used)
        if has_room:
            self._notes.plan(change)
        try:
            self.commit(change)
        except WRITE_ERRORS as error:
            self._fail(error)
            self._give_up(written, used)
            if blocks:
                self._unwritten.tried(in_vain=True)
            self._dirty = newest
            self._notes_failed = self._notes.has_unsaved
            return False
        self._notes_failed = not has_room and self._notes.has_unsaved
        self._view.saved([*self._dirty.values(), *agents])
        self._dirty = {}
        self._counters.add(Count.BLOCKS_WRITTEN, len(written))
        if blocks:
            self._unwritten.tried(in_vain=not written)
        # An empty commit writes nothing, and shows nothing while something waits.
        if change.num_rows or not self._unwritten:
            self._catalog_failed = False
        self._hold_quotas(newest.keys() | (self._with_quota() if again else set()))
        if not self._catalog_failed:
            self._health.works("catalog")
        if self._files_work and not self._unwritten:
            self._health.works("block files")
        return True

    def settle(self, on_batch: Callable[[], None] = lambda: None) -> None:
        """Record uses, and try what failed before again now: each block once, until nothing of a batch is
        written. `on_batch` is called before each."""
        self._unwritten.begin_round(probe=self._catalog_failed)
        on_batch()
        while self.store([], [], self._view.take_touched()) and self._unwritten.in_round:
            on_batch()

    def _with_quota(self) -> set[AgentId]:
        """Whose blocks may be too many, when blocks come long after their agents."""
        return {agent.id for agent in self._index.agents.values() if agent.quota_nbytes}

    def _hold_quotas(self, agents: Iterable[AgentId]) -> None:
        self._to_trim.update(agents)
        try:
            for agent in list(self._to_trim):
                self.trim_to_quota(agent)
                self._to_trim.remove(agent)
        except WRITE_ERRORS as error:
            self._fail(error)

    def _fail(self, error: WriteError) -> None:
        """The catalog was not written; it is tried again."""
        self._catalog_failed = True
        self._health.failed("catalog", error)

    def enforce_quota(self, nbytes: int = 0) -> None:
        """Evict until `nbytes` more fit. Raises StoreError when they cannot, and as `commit` does."""
        if self._fits(nbytes):
            return
        self._trim_catalog()
        if self._fits(nbytes):
            return
        excess = self._ledger.total + nbytes - int(self._quota_nbytes * LOW_WATER)
        rows = victims(self._index, excess)
        reachable = self._index.reachable(self._index.refs())
        removed = self._remove(rows, reachable)
        self._counters.add(Count.EVICTIONS, removed.num_blocks)
        log.info("evicted %d blocks, %d bytes", removed.num_blocks, removed.nbytes)
        self._trim_catalog()
        if not self._fits(nbytes):
            raise StoreError(f"{nbytes} bytes do not fit the disk quota of {self._quota_nbytes} bytes")

    def set_aside(self, row: BlockRow) -> None:
        """Quarantine the damaged file of `row` and drop its payload, unless the block was replaced."""
        if self._index.blocks.get(row.key) is not row:
            return
        change = Change()
        drop_payload(change, row, self._index.reachable(self._index.refs()))
        change.doomed.clear()
        try:
            self._files.quarantine_block(row.namespace, row.key)
            self.commit(change)
        except WRITE_ERRORS as error:
            # Nobody reads it until a restart, and then it is found again.
            log.error("damaged block %s stays where it is: %s", row.key.hex(), error)

    def delete_agents(self, ids: Sequence[AgentId], name: str) -> Removal:
        """Delete agents, their documents, and what only they reached.

        Their files are overwritten before they go. Raises AgentNotFound, and as `commit` does.
        """
        removed: dict[BlockKey, BlockRow] = {}
        try:
            for gone in self._existing(ids, name):
                removed |= self._delete_agent(gone)
        finally:
            self._unwritten.forget_unreached()
        self._purge(removed)
        return _removal(removed.values())

    def _delete_agent(self, gone: AgentId) -> Mapping[BlockKey, BlockRow]:
        """What of it was on record."""
        removed: dict[BlockKey, BlockRow] = {}
        unsaved = self._dirty.get(gone)
        documents = self._documents_of(gone)
        if gone in self._index.agents:
            change = agent_deletion(self._index, gone, self._view.unsaved_keys(but=unsaved))
            change.documents |= dict.fromkeys(documents)
            self.commit(change)
            removed |= change.removed
        for document in documents:
            self._notes.documents.delete(document)  # what was put meanwhile goes too
        if unsaved is not None:
            del self._dirty[gone]
            self._view.saved([unsaved])
            rows = self._unneeded(link.key for link in unsaved.update.links)
            self._remove(rows, frozenset(), wipe=True)
            removed |= {row.key: row for row in rows}
        return removed

    def collect(self, used_before: float) -> Removal:
        """Remove what no agent reaches and was last used before (Unix seconds). Raises as `commit` does."""
        return self._remove(unreached(self._index, used_before, self._view.unsaved_keys()), frozenset())

    def trim_to_quota(self, id: AgentId) -> None:
        """Evict what the agent has above its own quota. Raises as `commit` does."""
        agent = self._index.agents.get(id)
        rows = over_quota(self._index, agent) if agent is not None else []
        if rows:
            removed = self._remove(rows, self._index.reachable(self._index.refs()))
            self._counters.add(Count.EVICTIONS, removed.num_blocks)

    def recorded(self, ids: Sequence[AgentId], name: str) -> AgentRow:
        """The last used of those agents. Raises AgentNotFound, and StoreError when its newest state is not
        on disk."""
        newest = max(self._existing(ids, name), key=self._used_at)
        if newest in self._dirty:
            raise StoreError(f"agent {name!r} is not on disk yet; see the store's health")
        return self._index.agents[newest]

    def _used_at(self, id: AgentId) -> float:
        return self._dirty[id].saved_at if id in self._dirty else self._index.agents[id].used_at

    def _documents_of(self, id: AgentId) -> list[DocumentId]:
        tags = self._index.checkpoints.get(id, {})
        return agent_documents(id.tenant, id.name, tags)

    def _purge(self, removed: Mapping[BlockKey, BlockRow]) -> None:
        """What is left of deleted blocks beside their files: in quarantine, and in the catalog's log."""
        try:
            self._files.purge_quarantine((key, row.namespace) for key, row in removed.items())
        except OSError as error:
            self._health.failed("removal of files", error)
        self._trim_catalog()

    def add(self, blocks: Sequence[PendingBlock]) -> None:
        """Make blocks durable now, all or none. Raises StoreError when they do not fit, and as `commit`."""
        known = self._index.blocks
        # One that was stored meanwhile is not touched: what fails below takes files away.
        blocks = [b for b in blocks if b.link.key not in known or not known[b.link.key].nbytes]
        nbytes = sum(block.format.file_nbytes(block.tokens) for block in blocks)
        self.enforce_quota(nbytes + 2 * CATALOG_ROOM_NBYTES + len(blocks) * ROW_ROOM_NBYTES)
        written, failed = self._files.write(blocks)
        self._counters.add(Count.BYTES_WRITTEN, sum(w.nbytes for w in written))
        try:
            if failed:
                raise failed[0][1]
            self.commit(plan_batch(self._index, self._view.unsaved_tips(), written, [], {}))
        except WRITE_ERRORS:
            self._doomed.update((block.link.key, block.namespace) for block in blocks)
            self.unlink_doomed()
            raise
        self._counters.add(Count.BLOCKS_WRITTEN, len(written))

    def remove_unreached(self, keys: Iterable[BlockKey]) -> Removal:
        """Remove, and overwrite, those blocks that nobody needs. Raises as `commit` does."""
        self._unwritten.forget_unreached()
        return self._remove(self._unneeded(keys), frozenset(), wipe=True)

    def _unneeded(self, keys: Iterable[BlockKey]) -> list[BlockRow]:
        kept = self._index.reachable(self._index.refs()) | self._view.unsaved_keys()
        blocks = self._index.blocks
        return [blocks[key] for key in dict.fromkeys(keys) if key in blocks and key not in kept]

    def _settled(self) -> set[BlockKey]:
        """Unlinked files that no power cut brings back; many at a time, each folder costs an fsync."""
        if len(self._unlinked) < MAX_UNLINKED:
            return set()
        try:
            self._files.sync_folders(self._unlinked.items())
        except OSError as error:
            log.warning("folders of unlinked files: %s", error)
            return set()
        return self._unlinked.keys() - self._doomed.keys()

    def _fits(self, nbytes: int) -> bool:
        return self._ledger.total + nbytes <= self._quota_nbytes

    def _trim_catalog(self) -> None:
        self._catalog.trim(limit_nbytes=0)
        self._ledger.measure_catalog()

    def _existing(self, ids: Sequence[AgentId], name: str) -> list[AgentId]:
        """Those of `ids` that are recorded or wait to be. Raises AgentNotFound when none is."""
        existing = [one for one in ids if one in self._index.agents or one in self._dirty]
        if not existing:
            raise not_found(name)
        return existing

    def _make_room(self, blocks: Sequence[PendingBlock], agents: Iterable[UnsavedAgent]) -> bool:
        """Whether there is room for the files of `blocks` in the quota, after evictions.

        Blocks that do not fit are dropped: that does not change by itself. Those that evictions failed to
        make room for are kept.
        """
        links = (link for agent in agents for link in agent.update.links)
        num_rows = len(blocks) + sum(link.key not in self._index.blocks for link in links)
        catalog_room = 2 * CATALOG_ROOM_NBYTES + (num_rows + REMOVAL_BATCH) * ROW_ROOM_NBYTES
        # What is written is in the log and in the database until the log is folded in.
        catalog_room += 2 * self._notes.unsaved_nbytes
        try:
            self.enforce_quota(sum(block.format.file_nbytes(block.tokens) for block in blocks) + catalog_room)
        except WRITE_ERRORS as error:
            if blocks:
                self._files_work = False
                self._health.failed("block files", error)
                if isinstance(error, StoreError) and not isinstance(error, DamagedCatalog):
                    self._drop(blocks)
                else:
                    self._set_back(blocks)
            if self._notes.has_unsaved:
                self._health.failed("documents", error)
            return False
        self._health.works("documents")
        return True

    def _write(self, blocks: Sequence[PendingBlock]) -> list[WrittenBlock]:
        """Write the files; what fails is written anew later."""
        written, failed = self._files.write(blocks)
        for _, error in failed:
            self._health.failed("block files", error)
        if failed:
            # One whose folder could not be synced lies there without a row: nobody could delete it later.
            self._spare(written)
            self._doomed.update((block.link.key, block.namespace) for block, _ in failed)
            self.unlink_doomed()
        self._set_back([block for block, _ in failed])
        if blocks:
            self._files_work = not failed
        self._counters.add(Count.BYTES_WRITTEN, sum(w.nbytes for w in written))
        return written

    def _spare(self, written: Sequence[WrittenBlock]) -> None:
        """These files are new: it was the ones before them that were to go."""
        for w in written:
            self._doomed.pop(w.block.link.key, None)
            self._to_wipe.discard(w.block.link.key)

    def _give_up(self, written: Sequence[WrittenBlock], used: Mapping[BlockKey, float]) -> None:
        """The rows of these files could not be committed."""
        self._doomed.update((w.block.link.key, w.block.namespace) for w in written)
        self.unlink_doomed()
        self._set_back([w.block for w in written])
        self._view.touch_again(used)

    def _set_back(self, blocks: Collection[PendingBlock]) -> None:
        if blocks:
            self._unwritten.add(blocks)
            self._counters.add(Count.FAILED_WRITES, len(blocks))

    def _drop(self, blocks: Collection[PendingBlock]) -> None:
        self._view.drop([block.link.key for block in blocks])
        self._counters.add(Count.FAILED_WRITES, len(blocks))

    def _remove(self, rows: Sequence[BlockRow], reachable: Set[BlockKey], *, wipe: bool = False) -> Removal:
        """Drop payloads, and the rows that are not in `reachable`, a few per transaction."""
        for start in range(0, len(rows), REMOVAL_BATCH):
            change = Change(wipe=wipe)
            for row in rows[start : start + REMOVAL_BATCH]:
                drop_payload(change, row, reachable)
            self.commit(change)
        return _removal(rows)


def _removal(rows: Collection[BlockRow]) -> Removal:
    keys = frozenset(row.key for row in rows)
    return Removal(sum(row.nbytes > 0 for row in rows), sum(row.nbytes for row in rows), keys)
