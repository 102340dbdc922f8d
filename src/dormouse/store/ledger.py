"""One account of every byte below the data folder, and the counters that statistics show."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from pathlib import Path
from threading import Lock
from typing import TypeVar

from dormouse.domain.blocks import BlockKey
from dormouse.store.layout import Layout

K = TypeVar("K")


class Ledger:
    """Sizes of all files of the store, in bytes. Kept by the writer thread; anyone may read `total`."""

    def __init__(self, layout: Layout) -> None:
        self._own = (layout.lock, layout.vault, *layout.catalog_files)
        self._files: dict[BlockKey, int] = {}
        self._temps: dict[Path, int] = {}
        self._quarantine: dict[Path, int] = {}
        self.blocks = 0
        self.temps = 0
        self.quarantine = 0
        self.catalog = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.blocks + self.temps + self.quarantine + self.catalog

    def set_block(self, key: BlockKey, nbytes: int) -> None:
        """The file of a block has this size now; 0 when it is gone."""
        self.blocks += nbytes - self._files.get(key, 0)
        _set(self._files, key, nbytes)

    def set_temp(self, path: Path, nbytes: int) -> None:
        """A temp file has at most this size now; 0 when it is gone."""
        self.temps += nbytes - self._temps.get(path, 0)
        _set(self._temps, path, nbytes)

    def set_quarantined(self, path: Path, nbytes: int) -> None:
        """A quarantined file has this size; 0 when it is gone."""
        self.quarantine += nbytes - self._quarantine.get(path, 0)
        _set(self._quarantine, path, nbytes)

    def quarantined(self) -> list[tuple[Path, int]]:
        """Quarantined files and sizes, oldest first."""
        return sorted(self._quarantine.items())

    def measure_catalog(self) -> None:
        """Look at the sizes of the catalog's files; SQLite changes them on its own."""
        self.catalog = sum(_size(path) for path in self._own)


class Count(StrEnum):
    """What happened since the store was opened."""

    BLOCKS_WRITTEN = "blocks_written"
    BYTES_WRITTEN = "bytes_written"
    EVICTIONS = "evictions"
    REFUSED_PUTS = "refused_puts"
    """Puts that found the queue full or the writer stopped."""
    FAILED_WRITES = "failed_writes"
    """Writes of accepted blocks that failed, and accepted blocks that found no room in the quota."""
    LOADS = "loads"
    BYTES_READ = "bytes_read"
    MISSES = "misses"
    DAMAGED = "damaged"


class Counters:
    """Counts that any thread may add to."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[Count] = Counter()

    def add(self, count: Count, amount: int = 1) -> None:
        """Add `amount`."""
        with self._lock:
            self._counts[count] += amount

    def snapshot(self) -> dict[str, int]:
        """All counts by name."""
        with self._lock:
            return {str(count): self._counts[count] for count in Count}


def _set(sizes: dict[K, int], name: K, nbytes: int) -> None:
    if nbytes:
        sizes[name] = nbytes
    else:
        sizes.pop(name, None)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
