"""A disk that fails from a given step on, until it is mended, and that loses what it failed to sync."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.store.kit import FaultyOps

from dormouse.store.file_ops import FileOps

CATALOG_STEPS = ("commit", "fold")


@dataclass(frozen=True, slots=True)
class Fault:
    """What a disk says: to files, and through SQLite. `code` is what health calls it."""

    name: str
    number: int
    sqlite_code: int
    sqlite_text: str
    code: str

    def error(self, step: str) -> Exception:
        """To be raised by that step."""
        if step not in CATALOG_STEPS:
            return OSError(self.number, os.strerror(self.number))
        error = sqlite3.OperationalError(self.sqlite_text)
        error.sqlite_errorcode = self.sqlite_code
        return error


FAULTS = (
    Fault("no space", errno.ENOSPC, sqlite3.SQLITE_FULL, "database or disk is full", "disk_full"),
    Fault("quota of the disk", errno.EDQUOT, sqlite3.SQLITE_FULL, "database or disk is full", "disk_full"),
    Fault("I/O error", errno.EIO, sqlite3.SQLITE_IOERR_FSYNC, "disk I/O error", "write_failed"),
    Fault("busy", errno.EBUSY, sqlite3.SQLITE_BUSY, "database is locked", "write_failed"),
    Fault(
        "read-only",
        errno.EROFS,
        sqlite3.SQLITE_READONLY,
        "attempt to write a readonly database",
        "store_read_only",
    ),
)


class FailingDisk(FaultyOps):
    """Counts its steps. Once armed, those after some fail, `num_failures` of them or, without, until `mend`.

    A failed write leaves a part of it. A failed sync of a file leaves zeros in it, one of a folder takes the
    names out that were new in it: a kernel may drop what it could not write and call it clean, so that a
    second sync brings nothing back.
    """

    def __init__(self, fault: Fault, num_failures: int | None = None) -> None:
        super().__init__(self._step)
        self._fault = fault
        self._fail_after: int | None = None
        self._left = num_failures
        self._paths: dict[int, Path] = {}
        self._new: dict[Path, list[Path]] = {}
        self.num_steps = 0
        self.failed: list[str] = []

    def arm(self, num_steps: int) -> None:
        """So many more steps work."""
        self._fail_after = self.num_steps + num_steps

    def mend(self) -> None:
        """Nothing fails from here on."""
        self._fail_after = None

    def open_temp(self, path: Path) -> int:
        fd = super().open_temp(path)
        self._paths[fd] = path
        return fd

    def write(self, fd: int, parts: Sequence[bytes]) -> None:
        """A short write, when it fails."""
        half = [bytes(parts[0]), bytes(parts[1][: len(parts[1]) // 2])]
        self._or(lambda: FaultyOps.write(self, fd, parts), lambda: FileOps.write(self, fd, half))

    def fsync(self, fd: int) -> None:
        path = self._paths[fd]
        self._or(lambda: FaultyOps.fsync(self, fd), lambda: path.write_bytes(bytes(path.stat().st_size)))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._new.setdefault(target.parent, []).append(target)

    def fsync_folder(self, folder: Path) -> None:
        self._or(lambda: FaultyOps.fsync_folder(self, folder), lambda: self._lose_names(folder))
        self._new.pop(folder, None)

    def _lose_names(self, folder: Path) -> None:
        for path in self._new.pop(folder, []):
            path.unlink(missing_ok=True)

    def _or(self, action: Callable[[], None], spoil: Callable[[], object]) -> None:
        try:
            action()
        except OSError:
            spoil()
            raise

    def _step(self, step: str, _: object) -> None:
        self.num_steps += 1
        if self._fail_after is None or self.num_steps <= self._fail_after or self._left == 0:
            return
        if self._left is not None:
            self._left -= 1
        self.failed.append(step)
        raise self._fault.error(step)
