"""Files in the system's page cache, or out of it, before something that reads them is measured."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_READ_NBYTES = 1 << 20


def warm(folder: Path) -> None:
    """Read every file below `folder`, so that the next reader finds it in memory."""
    for fd in _opened(folder):
        while os.read(fd, _READ_NBYTES):
            pass


def drop(folder: Path) -> None:
    """Have every file below `folder` read from the disk by the next reader. Needs `posix_fadvise`."""
    for fd in _opened(folder):
        os.fsync(fd)  # What is not on disk yet would stay.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _opened(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                yield file.fileno()
