"""Payloads from block files straight into pages."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping

from dormouse.domain.blocks import BlockKey, Namespace
from dormouse.domain.errors import BlockMissing, DamagedBlock, StoreError
from dormouse.store.files import BlockFormat, open_block
from dormouse.store.layout import Layout
from dormouse.store.ledger import Count, Counters
from dormouse.store.plain_blocks import BlockCodec
from dormouse.store.rows import BlockRow
from dormouse.store.view import StoreView

log = logging.getLogger(__name__)

LoadError = StoreError | OSError


class BlockReader:
    """Reads one block at a time; one instance serves all reader threads."""

    def __init__(
        self,
        layout: Layout,
        codec: BlockCodec,
        view: StoreView,
        formats: Mapping[Namespace, BlockFormat],
        counters: Counters,
        on_damage: Callable[[BlockRow], None],
    ) -> None:
        self._layout = layout
        self._codec = codec
        self._view = view
        self._formats = formats
        self._counters = counters
        self._on_damage = on_damage

    def read(self, key: BlockKey, into: memoryview) -> LoadError | None:
        """Fill `into` with the block's payload, verified; the error instead when that is not possible."""
        found = self._view.find(key)
        if found is None:
            return self._miss(key)
        if not isinstance(found, BlockRow):
            into[:] = found.payload
            return None
        try:
            self._read_file(found, into)
        except FileNotFoundError:
            return self._vanished(found)
        except DamagedBlock as error:
            return self._give_up(found, error)
        except OSError as error:
            return self._give_up(found, error) if error.errno == errno.EIO else error
        self._counters.add(Count.LOADS)
        self._counters.add(Count.BYTES_READ, found.nbytes)
        return None

    def damaged(self, row: BlockRow, error: Exception) -> None:
        """Log and count a bad file, call its payload absent and have it quarantined; once per file."""
        if self._view.mark_damaged(row):
            self._counters.add(Count.DAMAGED)
            log.error("block %s is damaged and will be computed again: %s", row.key.hex(), error)
            self._on_damage(row)

    def _read_file(self, row: BlockRow, into: memoryview) -> None:
        fd = open_block(self._layout.block(row.namespace, row.key))
        try:
            self._codec.load(fd, row, self._formats[row.namespace], into)
        finally:
            os.close(fd)

    def _miss(self, key: BlockKey) -> BlockMissing:
        self._counters.add(Count.MISSES)
        return BlockMissing(f"block {key.hex()} is not stored")

    def _vanished(self, row: BlockRow) -> LoadError:
        if self._view.find(row.key) is row:
            return self._give_up(row, DamagedBlock("file is gone"))
        return self._miss(row.key)

    def _give_up(self, row: BlockRow, error: LoadError) -> LoadError:
        self.damaged(row, error)
        return error
