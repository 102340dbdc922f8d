"""From a folder to a store that can be used: lock, keys, catalog, reconciliation, quota."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dormouse.domain.errors import DamagedCatalog, StoreError
from dormouse.store.block_files import BlockFiles
from dormouse.store.catalog import Catalog, refuse_newer
from dormouse.store.columns import PlainColumns, SealedColumns
from dormouse.store.documents import DocumentBounds, Documents
from dormouse.store.encryption import layout_of, unlock
from dormouse.store.file_ops import FileOps
from dormouse.store.health import WRITE_ERRORS, Health
from dormouse.store.index import Index
from dormouse.store.keeper import Keeper
from dormouse.store.layout import FOLDER_MODE, Layout
from dormouse.store.ledger import Counters, Ledger
from dormouse.store.lock import FolderLock
from dormouse.store.master_key import KeySource
from dormouse.store.notes import Notes
from dormouse.store.plain_blocks import BlockCodec, PlainBlocks
from dormouse.store.reconcile import Reconciler
from dormouse.store.replies import Replies, ReplyBounds
from dormouse.store.row_codec import RowCodec
from dormouse.store.rows import Change
from dormouse.store.sealed_blocks import SealedBlocks
from dormouse.store.unwritten import Unwritten
from dormouse.store.vault import Vault
from dormouse.store.view import StoreView

log = logging.getLogger(__name__)

GROUP_AND_OTHERS = 0o077


@dataclass(frozen=True, slots=True)
class StoreParts:
    """An open data folder: everything but the threads. `vault` is that of an encrypted one."""

    layout: Layout
    catalog: Catalog
    codec: BlockCodec
    vault: Vault | None
    ledger: Ledger
    index: Index
    view: StoreView
    notes: Notes
    keeper: Keeper
    counters: Counters
    health: Health
    findings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Sizes in bytes, times in seconds, and the bounds of the notes."""

    quota_nbytes: int
    queue_nbytes: int
    batch_nbytes: int
    retry_s: float
    quarantine_nbytes: int
    documents: DocumentBounds
    replies: ReplyBounds


def open_parts(
    folder: Path, ops: FileOps, bounds: Bounds, now: float, key_source: KeySource | None
) -> tuple[FolderLock, StoreParts]:
    """Lock the folder, create what is missing, make files and catalog agree, enforce the quota.

    Raises StoreLocked, StoreTooNew, EncryptionMismatch, and StoreError when the folder cannot be used.
    """
    with ExitStack() as undo:
        try:
            lock = lock_folder(folder, ops)
            undo.callback(lock.release)
            parts = assemble(folder, ops, bounds, now, unlock(folder, ops, key_source))
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"data folder {folder} cannot be used: {error}") from error
        undo.pop_all()
    return lock, parts


def lock_folder(folder: Path, ops: FileOps) -> FolderLock:
    """Own the folder, which is made if there is none; one of a newer version is left as it is.

    Raises StoreLocked, StoreTooNew and OSError.
    """
    _create(folder, ops)
    lock = FolderLock(Layout(folder).lock)
    try:
        for layout in (Layout(folder), Layout(folder, bytes)):
            refuse_newer(layout.catalog)  # before anything is written
    except BaseException:
        lock.release()
        raise
    lock.sign()
    return lock


def assemble(folder: Path, ops: FileOps, bounds: Bounds, now: float, vault: Vault | None) -> StoreParts:
    """Open a folder that is locked. Raises StoreTooNew, EncryptionMismatch, OSError, sqlite3.Error."""
    layout = layout_of(folder, vault)
    codec = PlainBlocks() if vault is None else SealedBlocks(vault)
    rows = RowCodec(PlainColumns() if vault is None else SealedColumns(vault))
    ledger = Ledger(layout)
    files = BlockFiles(layout, ops, ledger, codec, bounds.quarantine_nbytes)
    with ExitStack() as undo:
        for path in (layout.root, layout.blocks, layout.quarantine):
            make_private(path, ops)
        opening = _Opening(layout, ops, files, codec, rows, ledger, vault, now)
        catalog, index, findings = opening.load()
        undo.callback(catalog.close)
        view = StoreView(index, bounds.queue_nbytes)
        notes = Notes(
            Documents(bounds.documents, catalog.documents()),
            Replies(bounds.replies, now, catalog.replies()),
        )
        counters, health = Counters(), Health()
        keeper = Keeper(
            catalog=catalog,
            files=files,
            index=index,
            view=view,
            ledger=ledger,
            counters=counters,
            health=health,
            notes=notes,
            unwritten=Unwritten(
                index,
                view,
                max_nbytes=bounds.queue_nbytes // 2,
                max_batch_nbytes=bounds.batch_nbytes,
                retry_s=bounds.retry_s,
            ),
            quota_nbytes=bounds.quota_nbytes,
        )
        try:
            keeper.enforce_quota()
        except WRITE_ERRORS as error:
            health.failed("block files", error)
        undo.pop_all()
    findings = (*findings, *catalog.findings)
    return StoreParts(
        layout, catalog, codec, vault, ledger, index, view, notes, keeper, counters, health, findings
    )


@dataclass(frozen=True, slots=True)
class _Opening:
    """What reading and reconciling need."""

    layout: Layout
    ops: FileOps
    files: BlockFiles
    codec: BlockCodec
    rows: RowCodec
    ledger: Ledger
    vault: Vault | None
    now: float

    def load(self) -> tuple[Catalog, Index, tuple[str, ...]]:
        """Open and reconcile; a catalog that cannot be read is set aside and made anew."""
        existed = self.layout.catalog.exists()
        try:
            catalog, index, reconciler = self._read()
            lost = None if existed else "the catalog was gone"
        except DamagedCatalog as error:
            log.error("%s; it moves to quarantine and is rebuilt from the block files", error)
            self._set_catalog_aside()
            catalog, index, reconciler = self._read()
            lost = f"{error}; it is in quarantine"
        self.ledger.measure_catalog()
        log.info("opened %s: %d blocks, %s", self.layout.root, len(index.blocks), reconciler.findings)
        findings = []
        if lost is not None and (existed or reconciler.findings.adopted):
            findings.append(f"{lost}; blocks were found again, the names and histories of agents are lost")
            log.warning("%s", findings[0])
        return catalog, index, tuple(findings)

    def _read(self) -> tuple[Catalog, Index, Reconciler]:
        if not self.layout.catalog.exists():
            self._set_catalog_aside()  # A log without its database belongs to another one.
        catalog = Catalog(self.layout.catalog, self.ops, self.rows)
        try:
            _pull_back(catalog, self.now)
            if self.vault is not None:
                _purge(catalog, self.vault)
            reconciler = Reconciler(self.layout, catalog, self.files, self.codec, self.ledger, self.ops)
            index, change = reconciler.load()
            _commit_repairs(catalog, change)
            index.apply(change)
        except BaseException:
            catalog.close()
            raise
        return catalog, index, reconciler

    def _set_catalog_aside(self) -> None:
        for path in self.layout.catalog_files:
            if path.exists():
                self.files.quarantine(path)


def _purge(catalog: Catalog, vault: Vault) -> None:
    # What cannot be removed now cannot be read either, and goes at the next start.
    try:
        catalog.purge(vault.destroyed)
    except sqlite3.Error as error:
        log.warning("rows of forgotten tenants could not be removed: %s", error)


def _pull_back(catalog: Catalog, now: float) -> None:
    try:
        catalog.pull_back(now)
    except sqlite3.Error as error:
        log.warning("uses ahead of the clock stay as they are: %s", error)


def _commit_repairs(catalog: Catalog, change: Change) -> None:
    # A disk that is full or read-only must not keep a server from starting: the next start repairs again.
    try:
        catalog.apply(change)
    except sqlite3.Error as error:
        log.warning("what start-up repaired could not be recorded: %s", error)


def make_private(folder: Path, ops: FileOps) -> None:
    """Make `folder` its owner's only, and what lacks above it too: who can rename a parent has the folder."""
    _create(folder, ops)
    if folder.stat().st_mode & GROUP_AND_OTHERS:
        folder.chmod(FOLDER_MODE)


def _create(folder: Path, ops: FileOps) -> None:
    """Create `folder` and what is missing above it; each new name is durable before it is used."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        ops.make_folder(path)
