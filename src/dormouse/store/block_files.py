"""Block files on disk: written, unlinked and set aside, each with its entry in the ledger."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dormouse.domain.blocks import BlockKey, Namespace
from dormouse.store.file_ops import FileOps
from dormouse.store.files import payload_checksum
from dormouse.store.layout import Layout, temp_of
from dormouse.store.ledger import Ledger
from dormouse.store.plain_blocks import BlockCodec
from dormouse.store.view import PendingBlock

CATALOG_NAME = "catalog.sqlite"

log = logging.getLogger(__name__)

MAX_QUARANTINE_NAME = 150


@dataclass(frozen=True, slots=True)
class WrittenBlock:
    """A block whose file is durable and whose row is still to come. `nbytes` is the file's size."""

    block: PendingBlock
    nbytes: int
    checksum: str


class BlockFiles:
    """The `blocks` and `quarantine` folders. Used by one thread at a time; methods raise OSError."""

    def __init__(
        self, layout: Layout, ops: FileOps, ledger: Ledger, codec: BlockCodec, max_quarantine_nbytes: int
    ) -> None:
        self._layout = layout
        self._codec = codec
        self._ops = ops
        self._ledger = ledger
        self._max_quarantine_nbytes = max_quarantine_nbytes
        self._folders: set[Path] = set()

    def write(
        self, blocks: Iterable[PendingBlock]
    ) -> tuple[list[WrittenBlock], list[tuple[PendingBlock, OSError]]]:
        """Write a batch: temp files, fsync, rename, then each folder once. Those durable, those failed."""
        failed: list[tuple[PendingBlock, OSError]] = []
        renamed: dict[Path, list[WrittenBlock]] = {}
        for block in blocks:
            try:
                folder, written = self._write_one(block)
            except OSError as error:
                failed.append((block, error))
            else:
                renamed.setdefault(folder, []).append(written)
        durable: list[WrittenBlock] = []
        for folder, group in renamed.items():
            try:
                self._ops.fsync_folder(folder)
            except OSError as error:
                failed.extend((written.block, error) for written in group)
            else:
                durable.extend(group)
        return durable, failed

    def unlink(self, namespace: Namespace, key: BlockKey, *, wipe: bool = False) -> None:
        """Remove a block's file; with `wipe` it is overwritten with zeros before."""
        path = self._layout.block(namespace, key)
        if wipe:
            self._wipe(path)
        self._ops.unlink(path)
        self._ledger.set_block(key, 0)

    def purge_quarantine(self, blocks: Iterable[tuple[BlockKey, Namespace]]) -> None:
        """Overwrite and remove what lies in quarantine of these blocks."""
        names = {self._layout.block(namespace, key).name for key, namespace in blocks}
        for path, _ in self._ledger.quarantined():
            if path.name.partition("-")[2] in names:
                self._wipe(path)
                self._ops.unlink(path)
                self._ledger.set_quarantined(path, 0)

    def sync_folders(self, blocks: Iterable[tuple[BlockKey, Namespace]]) -> None:
        """What was unlinked in the folders of these blocks stays unlinked."""
        for folder in {self._layout.block(namespace, key).parent for key, namespace in blocks}:
            with contextlib.suppress(FileNotFoundError):
                self._ops.fsync_folder(folder)

    def quarantine_block(self, namespace: Namespace, key: BlockKey) -> None:
        """Set a block's file aside; one that is gone is fine."""
        with contextlib.suppress(FileNotFoundError):
            self.quarantine(self._layout.block(namespace, key))
        self._ledger.set_block(key, 0)

    def quarantine(self, path: Path) -> None:
        """Move any file into quarantine, and the oldest there out of it when that is too much."""
        nbytes = path.lstat().st_size
        name = f"{time.time_ns():020}-{path.name[-MAX_QUARANTINE_NAME:]}"
        target = self._layout.quarantine / name
        self._ops.rename(path, target)
        self._ledger.set_quarantined(target, nbytes)
        log.warning("quarantined %s as %s", path, name)
        self._trim_quarantine()

    def _wipe(self, path: Path) -> None:
        # What cannot be overwritten (a full disk that copies on write, say) is to go all the same.
        try:
            self._ops.wipe(path)
        except OSError as error:
            log.warning("%s was not overwritten before it was removed: %s", path.name, error)

    def _trim_quarantine(self) -> None:
        for path, nbytes in self._ledger.quarantined():
            if self._ledger.quarantine <= self._max_quarantine_nbytes:
                return
            if CATALOG_NAME in path.name:
                continue  # It may hold the only copy of agents' histories: people decide.
            self._ops.unlink(path)
            self._ledger.set_quarantined(path, 0)
            log.info("quarantine is full: deleted %s (%d bytes)", path.name, nbytes)

    def _write_one(self, block: PendingBlock) -> tuple[Path, WrittenBlock]:
        key = block.link.key
        path = self._layout.block(block.namespace, key)
        checksum = payload_checksum(block.payload, block.tokens)
        parts = self._codec.parts(
            block.format, block.namespace, key, block.link.parent, block.tokens, block.payload, checksum
        )
        nbytes = sum(map(len, parts))
        self._make_folders(path.parent)
        temp = temp_of(path)
        self._ledger.set_temp(temp, nbytes)
        try:
            self._write_temp(temp, parts)
            self._ops.rename(temp, path)
        except OSError:
            self._discard_temp(temp)
            raise
        self._ledger.set_temp(temp, 0)
        self._ledger.set_block(key, nbytes)
        return path.parent, WrittenBlock(block, nbytes, checksum)

    def _write_temp(self, temp: Path, parts: tuple[bytes, ...]) -> None:
        fd = self._ops.open_temp(temp)
        try:
            self._ops.write(fd, parts)
            self._ops.fsync(fd)
        finally:
            self._ops.close(fd)

    def _discard_temp(self, temp: Path) -> None:
        # A temp file that cannot be removed stays in the ledger; the next start removes it.
        try:
            self._ops.unlink(temp)
        except OSError as error:
            log.warning("temp file %s stays: %s", temp.name, error)
        else:
            self._ledger.set_temp(temp, 0)

    def _make_folders(self, folder: Path) -> None:
        if folder not in self._folders:
            self._ops.make_folder(folder.parent)
            self._ops.make_folder(folder)
            self._folders.add(folder)
