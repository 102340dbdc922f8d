"""Start-up: files without rows and rows without files. No payload is read.

| found                              | becomes                                                        |
| ---------------------------------- | -------------------------------------------------------------- |
| temp file                          | removed                                                        |
| file of a block that was to go     | removed                                                        |
| file with its row                  | nothing; quarantined when its size is not the row's            |
| file without a row, header valid   | a row                                                          |
| any other file                     | quarantined                                                    |
| row without its file               | history only; no row when no agent reaches it                  |
| row whose key does not follow      | no row; its own file brings it back                            |
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from dormouse.domain.blocks import BlockKey, packed_block_key
from dormouse.domain.errors import DamagedBlock, KeyDestroyed
from dormouse.store.block_files import BlockFiles
from dormouse.store.catalog import Catalog
from dormouse.store.file_ops import FileOps
from dormouse.store.files import open_block
from dormouse.store.garbage import drop_payload
from dormouse.store.index import Index
from dormouse.store.layout import TEMP_SUFFIX, Layout
from dormouse.store.ledger import Ledger
from dormouse.store.plain_blocks import BlockCodec
from dormouse.store.rows import BlockRow, Change

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Findings:
    """What start-up repaired, by number."""

    files_removed: int = 0
    adopted: int = 0
    quarantined: int = 0
    payloads_missing: int = 0
    damaged_rows: int = 0

    def __str__(self) -> str:
        counts = {
            "unfinished files removed": self.files_removed,
            "blocks adopted": self.adopted,
            "files quarantined": self.quarantined,
            "payloads missing": self.payloads_missing,
            "damaged rows": self.damaged_rows,
        }
        found = [f"{count} {what}" for what, count in counts.items() if count]
        return ", ".join(found) or "nothing to repair"


class Reconciler:
    """Compares the folder with the catalog and plans what makes them agree."""

    def __init__(
        self,
        layout: Layout,
        catalog: Catalog,
        files: BlockFiles,
        codec: BlockCodec,
        ledger: Ledger,
        ops: FileOps,
    ) -> None:
        self._layout = layout
        self._codec = codec
        self._catalog = catalog
        self._files = files
        self._ledger = ledger
        self._ops = ops
        self._stored: set[BlockKey] = set()
        self._undead: set[Path] = set()
        self.findings = Findings()

    def load(self) -> tuple[Index, Change]:
        """The index as the catalog has it, and the change to it that the files on disk ask for.

        Raises DamagedCatalog, sqlite3.Error and OSError.
        """
        rows = {row.key: row for row in self._catalog.blocks()}
        damaged = {key: row for key, row in rows.items() if not _key_follows(row)}
        index = Index()
        agents = {agent.id: agent for agent in self._catalog.agents()}
        # An agent's row that does not open takes its checkpoints with it.
        checkpoints = {tag.id: tag for tag in self._catalog.checkpoints() if tag.id.agent in agents}
        index.apply(Change(rows=rows, agents=agents, checkpoints=checkpoints))
        for entry in _files_below(self._layout.quarantine):
            self._ledger.set_quarantined(Path(entry.path), entry.stat(follow_symlinks=False).st_size)
        doomed = {key: (ns, self._layout.block(ns, key)) for key, ns in self._catalog.doomed().items()}
        change = Change(rows=self._scan(index, damaged, {path for _, path in doomed.values()}))
        settled = {key: ns for key, (ns, path) in doomed.items() if path not in self._undead}
        self._files.sync_folders(settled.items())
        change.unlinked |= settled.keys()
        _number(index, change)
        # A damaged row still leads to its parents, whose history must not go with it.
        index.apply(change)
        self._drop_missing(index, change)
        for key in damaged.keys() - self._stored:
            log.error("catalog row of block %s is damaged; its agents lose that part", key.hex())
            change.rows.pop(key, None)
            change.removed[key] = damaged[key]
            self.findings.damaged_rows += 1
        return index, change

    def _scan(
        self, index: Index, damaged: Collection[BlockKey], doomed: Collection[Path]
    ) -> dict[BlockKey, BlockRow]:
        """Look at every file; rows for those that have none."""
        rows = {
            self._layout.block_name(row.namespace, key): row
            for key, row in index.blocks.items()
            if row.nbytes and key not in damaged
        }
        adopted = {}
        for entry in _files_below(self._layout.blocks):
            row = rows.get(entry.path[len(str(self._layout.blocks)) + 1 :])
            if row is not None and entry.stat(follow_symlinks=False).st_size == row.nbytes:
                self._keep(row.key, row.nbytes)
                continue
            path = Path(entry.path)
            try:
                if path.suffix == TEMP_SUFFIX or (row is None and path in doomed):
                    self._remove(path)
                else:
                    found = self._adopt(path)
                    adopted[found.key] = found
            except KeyDestroyed:
                self._remove(path)
            except DamagedBlock as error:
                self._set_aside(path, error)
            except OSError as error:
                # A disk that fails here fails loads and writes too, where it is reported.
                log.warning("%s: %s", path, error)
                self._undead.add(path)
        return adopted

    def _remove(self, path: Path) -> None:
        # It may be a deleted agent's: nobody remembers, so its content goes first.
        try:
            self._ops.wipe(path)
        except OSError as error:
            log.warning("%s was not overwritten before it was removed: %s", path.name, error)
        self._ops.unlink(path)
        self.findings.files_removed += 1

    def _keep(self, key: BlockKey, nbytes: int) -> None:
        self._ledger.set_block(key, nbytes)
        self._stored.add(key)

    def _adopt(self, path: Path) -> BlockRow:
        """A row for the file. Raises DamagedBlock when it is not a block in its place, and OSError."""
        if not stat.S_ISREG(path.lstat().st_mode):
            raise DamagedBlock("not a file")
        fd = open_block(path)
        try:
            header, tokens = self._codec.identify(fd)
            found = os.fstat(fd)
        finally:
            os.close(fd)
        if path != self._layout.block(header.namespace, header.key):
            raise DamagedBlock("its header names another block")
        self._keep(header.key, found.st_size)
        self.findings.adopted += 1
        return BlockRow(
            key=header.key,
            namespace=header.namespace,
            parent=header.parent,
            tokens=tokens,
            num_before=0,
            nbytes=found.st_size,
            checksum=header.checksum,
            used_at=found.st_mtime,
        )

    def _set_aside(self, path: Path, why: DamagedBlock) -> None:
        log.error("%s is not a block that can be used: %s", path, why)
        try:
            self._files.quarantine(path)
        except OSError as error:
            log.warning("%s stays where it is: %s", path, error)
        self.findings.quarantined += 1

    def _drop_missing(self, index: Index, change: Change) -> None:
        reachable = index.reachable(index.refs())
        for row in index.blocks.values():
            if row.key in self._stored:
                continue
            if row.nbytes:
                self.findings.payloads_missing += 1
            if row.nbytes or row.key not in reachable:
                drop_payload(change, row, reachable)
        change.doomed.clear()


def _key_follows(row: BlockRow) -> bool:
    return packed_block_key(row.namespace, row.parent, row.tokens) == row.key


def _files_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Everything below `folder` that is not a folder; links are not followed."""
    with os.scandir(folder) as entries:
        # The list is taken first: files are removed and moved while they are looked at.
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                yield from _files_below(Path(entry.path))
            else:
                yield entry


def _number(index: Index, change: Change) -> None:
    """Fill in `num_before` of the rows that `change` adds, parents first."""
    numbered: set[BlockKey] = set()
    for row in change.rows.values():
        run = []
        next_up: BlockRow | None = row
        while next_up is not None and next_up.key not in numbered:
            run.append(next_up)
            numbered.add(next_up.key)
            next_up = change.rows.get(next_up.parent)
        for child in reversed(run):
            parent = change.rows.get(child.parent) or index.blocks.get(child.parent)
            child.num_before = parent.end if parent is not None else 0
