"""Mapped weight files: what loading has read of them is dropped, as it was packed elsewhere."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


def drop_mapped(files: Sequence[Path]) -> None:
    """Drop this process's resident pages of mapped `files`; does nothing but on Linux.

    What stays mapped is read again where it is touched, mostly from the system's page cache.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for start, nbytes in _mappings({os.fsencode(path.resolve()) for path in files}):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), mmap.MADV_DONTNEED)


def _mappings(files: set[bytes]) -> Iterator[tuple[int, int]]:
    """Start and length of what is mapped of `files`.

    Looked up, not taken from tensors: memory that is no mapped file would be lost by dropping it.
    """
    for line in Path("/proc/self/maps").read_bytes().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in files:
            start, _, end = fields[0].partition(b"-")
            yield int(start, 16), int(end, 16) - int(start, 16)
