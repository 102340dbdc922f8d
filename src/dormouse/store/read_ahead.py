"""Block files into the system's page cache, before anybody has a page to load them into."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from queue import SimpleQueue
from threading import Thread

from dormouse.domain.blocks import BlockKey
from dormouse.store.files import open_block
from dormouse.store.layout import Layout
from dormouse.store.rows import BlockRow
from dormouse.store.view import StoreView

log = logging.getLogger(__name__)

MAX_QUEUED = 4096
"""Hints beyond it are dropped: whoever reads a block ahead of so many reads it too early."""


class ReadAhead:
    """A thread that asks the system to read. Its own, as asking may block: no load waits for a hint."""

    def __init__(self, layout: Layout, view: StoreView) -> None:
        self._layout = layout
        self._view = view
        self._keys: SimpleQueue[BlockKey | None] = SimpleQueue()
        self._is_stopped = not hasattr(os, "posix_fadvise")
        self._thread = Thread(target=self._run, name="store-read-ahead", daemon=True)
        self._thread.start()

    def submit(self, keys: Iterable[BlockKey]) -> None:
        """Queue blocks that will be loaded soon. Those that are not on disk are passed over."""
        for key in keys:
            if self._is_stopped or self._keys.qsize() >= MAX_QUEUED:
                return
            self._keys.put(key)

    def stop(self) -> None:
        """Drop what is queued and end the thread."""
        self._is_stopped = True
        self._keys.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (key := self._keys.get()) is not None:
            row = self._view.find(key)
            if isinstance(row, BlockRow) and not self._is_stopped:
                try:
                    self._hint(row)
                except OSError as error:
                    # A hint is worth nothing: the load that follows it says what is wrong.
                    log.debug("block %s was not read ahead: %s", key.hex(), error)

    def _hint(self, row: BlockRow) -> None:
        fd = open_block(self._layout.block(row.namespace, row.key))
        try:
            os.posix_fadvise(fd, 0, row.nbytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)
