"""Memory behind the part of an arena that is in use, mapped before anybody needs it."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading

from torch import Tensor

AHEAD_NBYTES = 256 << 20
"""So much is ready behind the furthest page used: several agents that wake one after the other."""

_PIECE_NBYTES = 4 << 20
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14: map for writing, and leave alone what is mapped already."""

_NICE = 19


class Headroom:
    """Maps an arena's memory ahead of its use, on a thread of its own that yields to all others.

    On virtual machines the first touch of memory is dearer than the read that fills it: 45 ms against
    10 ms for an agent of 4096 tokens. Does nothing but on Linux, for memory of the CPU.
    """

    def __init__(self, memory: Tensor) -> None:
        """`memory` is the arena's; `close` must come before it is let go of."""
        skipped = -memory.data_ptr() % mmap.PAGESIZE
        self._start = memory.data_ptr() + skipped
        is_ours = sys.platform == "linux" and memory.device.type == "cpu"
        self._nbytes = max(0, memory.nbytes - skipped) if is_ours else 0
        self._mapped = 0
        self._wanted = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def reach(self, nbytes: int) -> None:
        """The first `nbytes` of the memory are in use, or will be at once."""
        wanted = min(self._nbytes, nbytes + AHEAD_NBYTES)
        if wanted <= self._wanted:
            return
        with self._changed:
            self._wanted = wanted
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="headroom", daemon=True)
                self._thread.start()
            self._changed.notify()

    @property
    def mapped_nbytes(self) -> int:
        """The first bytes of the memory that are ready for use."""
        return self._mapped

    def close(self) -> None:
        """End the thread. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        libc = ctypes.CDLL(None)
        while self._wait():
            nbytes = min(_PIECE_NBYTES, self._nbytes - self._mapped)
            start = ctypes.c_void_p(self._start + self._mapped)
            if libc.madvise(start, ctypes.c_size_t(nbytes), _POPULATE_WRITE):
                return  # an older kernel, or no memory: pages are mapped as they are used
            self._mapped += nbytes

    def _wait(self) -> bool:
        """Wait until there is something to map; False once that is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._mapped < self._wanted)
            return not self._closed
