"""Every step that the store takes on disk, as one object that tests replace to fail, kill or record."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from dormouse.store.layout import FILE_MODE, FOLDER_MODE

_ZEROS = memoryview(bytes(1 << 20))


class FileOps:
    """The steps of the write protocol. Each raises OSError, `commit` and `fold` sqlite3.Error."""

    def make_folder(self, folder: Path) -> None:
        """Create `folder`, owner-only; its parent must exist. The new name is durable on return."""
        try:
            folder.mkdir(mode=FOLDER_MODE)
        except FileExistsError:
            return
        self.fsync_folder(folder.parent)

    def open_temp(self, path: Path) -> int:
        """A descriptor to write an empty file, owner-only; what a failed attempt left is overwritten."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, FILE_MODE)

    def write(self, fd: int, parts: Sequence[bytes]) -> None:
        """Write all of `parts`, one after the other."""
        views = [memoryview(part) for part in parts if part]
        while views:
            written = os.writev(fd, views)
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if written:
                views[0] = views[0][written:]

    def fsync(self, fd: int) -> None:
        """The file's bytes are on disk on return."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close a written file; some file systems report a failed write only here."""
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Atomically give `source` the name `target`."""
        source.replace(target)

    def fsync_folder(self, folder: Path) -> None:
        """The folder's names are on disk on return."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def wipe(self, path: Path) -> None:
        """Overwrite a file with zeros, down to the disk; one that is gone already is fine."""
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        try:
            left = os.fstat(fd).st_size
            while left > 0:
                left -= os.write(fd, _ZEROS[:left])
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: Path) -> None:
        """Remove a file; one that is gone already is fine."""
        path.unlink(missing_ok=True)

    def commit(self, connection: sqlite3.Connection) -> None:
        """Commit the catalog's transaction."""
        connection.execute("COMMIT")

    def fold(self, connection: sqlite3.Connection) -> None:
        """Fold the catalog's write-ahead log into its database, and empty it. Raises sqlite3.Error."""
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
