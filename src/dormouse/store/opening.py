"""From a folder to a store that can be used: lock, catalog, reconciliation, quota."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dormouse.domain.errors import DamagedCatalog, StoreError
from dormouse.store.block_files import BlockFiles
from dormouse.store.catalog import Catalog, refuse_newer
from dormouse.store.documents import DocumentBounds, Documents
from dormouse.store.file_ops import FileOps
from dormouse.store.health import WRITE_ERRORS, Health
from dormouse.store.index import Index
from dormouse.store.keeper import Keeper
from dormouse.store.layout import FOLDER_MODE, Layout
from dormouse.store.ledger import Counters, Ledger
from dormouse.store.lock import FolderLock
from dormouse.store.notes import Notes
from dormouse.store.reconcile import Reconciler
from dormouse.store.replies import Replies, ReplyBounds
from dormouse.store.rows import Change
from dormouse.store.view import StoreView

log = logging.getLogger(__name__)

GROUP_AND_OTHERS = 0o077


@dataclass(frozen=True, slots=True)
class StoreParts:
    """An open data folder: everything but the threads."""

    layout: Layout
    lock: FolderLock
    catalog: Catalog
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
    """Sizes in bytes, and the bounds of the notes."""

    quota_nbytes: int
    queue_nbytes: int
    quarantine_nbytes: int
    documents: DocumentBounds
    replies: ReplyBounds


def open_parts(folder: Path, ops: FileOps, bounds: Bounds, now: float) -> StoreParts:
    """Lock the folder, create what is missing, make files and catalog agree, enforce the quota.

    Raises StoreLocked, StoreTooNew, and StoreError when the folder cannot be used.
    """
    layout = Layout(folder)
    ledger = Ledger(layout)
    files = BlockFiles(layout, ops, ledger, bounds.quarantine_nbytes)
    with ExitStack() as undo:
        try:
            _create(layout.root, ops)
            lock = FolderLock(layout.lock)
            undo.callback(lock.release)
            refuse_newer(layout.catalog)  # before anything is written
            lock.sign()
            for path in (layout.root, layout.blocks, layout.quarantine):
                make_private(path, ops)
            catalog, index, view, findings = _load(layout, ops, files, ledger, bounds.queue_nbytes, now)
            undo.callback(catalog.close)
            notes = Notes(
                Documents(bounds.documents, catalog.documents()),
                Replies(bounds.replies, now, catalog.replies()),
            )
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"data folder {folder} cannot be used: {error}") from error
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
            quota_nbytes=bounds.quota_nbytes,
        )
        try:
            keeper.enforce_quota()
        except WRITE_ERRORS as error:
            health.failed("block files", error)
        undo.pop_all()
    return StoreParts(layout, lock, catalog, ledger, index, view, notes, keeper, counters, health, findings)


def _load(
    layout: Layout, ops: FileOps, files: BlockFiles, ledger: Ledger, queue_nbytes: int, now: float
) -> tuple[Catalog, Index, StoreView, tuple[str, ...]]:
    """Open and reconcile; a catalog that cannot be read is set aside and made anew."""
    existed = layout.catalog.exists()
    try:
        catalog, index, reconciler = _read(layout, ops, files, ledger, now)
        lost = None if existed else "the catalog was gone"
    except DamagedCatalog as error:
        log.error("%s; it moves to quarantine and is rebuilt from the block files", error)
        _set_catalog_aside(layout, files)
        catalog, index, reconciler = _read(layout, ops, files, ledger, now)
        lost = f"{error}; it is in quarantine"
    ledger.measure_catalog()
    log.info("opened %s: %d blocks, %s", layout.root, len(index.blocks), reconciler.findings)
    findings = []
    if lost is not None and (existed or reconciler.findings.adopted):
        findings.append(f"{lost}; blocks were found again, the names and histories of agents are lost")
        log.warning("%s", findings[0])
    return catalog, index, StoreView(index, queue_nbytes), tuple(findings)


def _read(
    layout: Layout, ops: FileOps, files: BlockFiles, ledger: Ledger, now: float
) -> tuple[Catalog, Index, Reconciler]:
    if not layout.catalog.exists():
        _set_catalog_aside(layout, files)  # A log without its database belongs to another one.
    catalog = Catalog(layout.catalog, ops)
    try:
        _pull_back(catalog, now)
        reconciler = Reconciler(layout, catalog, files, ledger, ops)
        index, change = reconciler.load()
        _commit_repairs(catalog, change)
        index.apply(change)
    except BaseException:
        catalog.close()
        raise
    return catalog, index, reconciler


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


def _set_catalog_aside(layout: Layout, files: BlockFiles) -> None:
    for path in layout.catalog_files:
        if path.exists():
            files.quarantine(path)


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
