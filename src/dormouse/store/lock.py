"""The lock that makes one process the owner of a data folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from dormouse.domain.errors import StoreLocked
from dormouse.store.layout import FILE_MODE

MAX_PID_NBYTES = 32


class FolderLock:
    """An exclusive flock on a file that holds the owner's pid, once signed; a dead owner's lock is free by itself."""

    def __init__(self, path: Path) -> None:
        """Take the lock. Raises StoreLocked when another process, or another store of ours, has it."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, FILE_MODE)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(self._fd, MAX_PID_NBYTES, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise StoreLocked(
                f"data folder {path.parent} is in use by process {pid}; "
                "stop that server, talk to it over HTTP, or choose another data folder"
            ) from None
        except OSError:
            os.close(self._fd)
            raise

    def release(self) -> None:
        """Give the folder up. The file stays: removing it would race with the next owner."""
        os.close(self._fd)

    def sign(self) -> None:
        """Write down who the owner is."""
        # A full disk must not keep a server from starting; the pid only serves the error message.
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            os.ftruncate(self._fd, 0)
