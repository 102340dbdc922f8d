"""The threads that read blocks, and what becomes of those whose disk does not answer."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from dormouse.domain.blocks import BlockKey
from dormouse.domain.errors import StoreError
from dormouse.store.reader import BlockReader, LoadError

log = logging.getLogger(__name__)

Done = Callable[[LoadError | None], None]

_MOST_STUCK = 8
"""So many threads that do not come back are replaced: one file that hangs holds up nobody, a whole disk that
does is not asked any more."""

_STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Load:
    """One block to read into `into`; `done` is called once, on a reader thread."""

    key: BlockKey
    into: memoryview
    done: Done
    queued_at: float = field(default_factory=time.monotonic)


@dataclass(slots=True, eq=False)
class _Thread:
    """`since` when it has been at one read, on the monotonic clock; a stuck one is not counted on."""

    thread: Thread | None = None
    since: float | None = None
    is_stuck: bool = False


class ReaderPool:
    """A few threads that work off loads in order."""

    def __init__(self, reader: BlockReader, num_threads: int) -> None:
        self._reader = reader
        self._num_threads = num_threads
        self._loads: SimpleQueue[Load | None] = SimpleQueue()
        self._lock = Lock()
        self._is_stopped = False
        self._threads: list[_Thread] = []
        for _ in range(num_threads):
            self._start()

    def submit(self, load: Load) -> None:
        """Queue a load. Raises StoreError after `stop`, and while the disk does not answer."""
        with self._lock:
            if self._is_stopped:
                raise StoreError("the store is closed")
            if all(one.is_stuck for one in self._threads):
                raise StoreError("no read returns; check the disk")
            self._loads.put(load)

    def relieve(self, waited_s: float) -> None:
        """Somebody has waited for a load for `waited_s` seconds in vain: it holds up no others any more.

        A thread that has been at one read for half of that is stuck, and another one takes over. What has
        been queued for so long fails, since nobody waits for it much longer. When too many threads are stuck
        all that is queued does, at once, until one of them comes back.
        """
        late = time.monotonic() - waited_s / 2
        with self._lock:
            for one in self._threads:
                one.is_stuck = one.since is not None and one.since <= late
            num_stuck = sum(one.is_stuck for one in self._threads)
            is_hopeless = num_stuck >= self._num_threads + _MOST_STUCK
        if is_hopeless:
            log.error("%d reads of blocks do not return; blocks are computed instead", num_stuck)
        self._fail_queued(None if is_hopeless else late)
        # Only now, or they would begin with what nobody waits for.
        with self._lock:
            while len(self._threads) < self._num_threads + min(num_stuck, _MOST_STUCK):
                self._start()

    def stop(self) -> None:
        """Finish what is queued and end the threads; those that are stuck are left behind."""
        with self._lock:
            self._is_stopped = True
            threads = list(self._threads)
        for _ in threads:
            self._loads.put(None)
        until = time.monotonic() + _STOP_S
        for one in threads:
            if one.thread is not None:
                one.thread.join(max(0.0, until - time.monotonic()))
                if one.thread.is_alive():
                    log.error("a read of a block does not return; its thread is left behind")

    def _start(self) -> None:
        one = _Thread()
        one.thread = Thread(target=self._run, args=(one,), name="store-reader", daemon=True)
        self._threads.append(one)
        one.thread.start()

    def _run(self, me: _Thread) -> None:
        while (load := self._loads.get()) is not None:
            me.since = time.monotonic()
            self._read(load)
            if not self._is_needed(me):
                return

    def _is_needed(self, me: _Thread) -> bool:
        """After a read: whether this thread goes on, or others have taken its place."""
        with self._lock:
            me.since, me.is_stuck = None, False
            if sum(not one.is_stuck for one in self._threads) <= self._num_threads:
                return True
            self._threads.remove(me)
            return False

    def _read(self, load: Load) -> None:
        try:
            error = self._reader.read(load.key, load.into)
        except Exception as unexpected:
            log.exception("reading block %s failed by an error of ours", load.key.hex())
            error = StoreError(f"reading a block failed: {unexpected!r}")
        _tell(load, error)

    def _fail_queued(self, until: float | None) -> None:
        """Those that were queued before `until`, or all."""
        queued: list[Load | None] = []
        with contextlib.suppress(Empty):
            while True:
                queued.append(self._loads.get_nowait())
        for load in queued:
            if load is not None and (until is None or load.queued_at <= until):
                _tell(load, StoreError("a read took too long; check the disk"))
            else:
                self._loads.put(load)


def _tell(load: Load, error: LoadError | None) -> None:
    try:
        load.done(error)
    except Exception:
        log.exception("the receiver of block %s failed", load.key.hex())
