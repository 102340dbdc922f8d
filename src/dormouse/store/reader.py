"""Reader threads: payloads from block files straight into pages."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock, Thread

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
Done = Callable[[LoadError | None], None]


@dataclass(frozen=True, slots=True)
class Load:
    """One block to read into `into`; `done` is called once, on a reader thread."""

    key: BlockKey
    into: memoryview
    done: Done


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


class ReaderPool:
    """A few threads that work off loads in order."""

    def __init__(self, reader: BlockReader, num_threads: int) -> None:
        self._reader = reader
        self._loads: SimpleQueue[Load | None] = SimpleQueue()
        self._stopping = Lock()
        self._is_stopped = False
        self._threads = [
            Thread(target=self._run, name=f"store-reader-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, load: Load) -> None:
        """Queue a load. Raises StoreError after `stop`."""
        with self._stopping:
            if self._is_stopped:
                raise StoreError("the store is closed")
            self._loads.put(load)

    def stop(self) -> None:
        """Finish what is queued and end the threads."""
        with self._stopping:
            self._is_stopped = True
        for _ in self._threads:
            self._loads.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (load := self._loads.get()) is not None:
            try:
                error = self._reader.read(load.key, load.into)
            except Exception as unexpected:
                log.exception("reading block %s failed by an error of ours", load.key.hex())
                error = StoreError(f"reading a block failed: {unexpected!r}")
            try:
                load.done(error)
            except Exception:
                log.exception("the receiver of block %s failed", load.key.hex())
