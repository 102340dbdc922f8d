"""Blocks on their way from the store into pages, who waits for them, and what to do when they do not come."""

from __future__ import annotations

import math
import time
from collections.abc import Container
from dataclasses import dataclass, field

from dormouse.domain.blocks import BlockKey, Link, Namespace
from dormouse.engine.pool import Pool
from dormouse.engine.sequence import Sequence, State
from dormouse.store.block_store import BlockStore

_RETRY_READ_S = 30.0


@dataclass(slots=True, eq=False)
class Load:
    """A block on its way from the store into `page`, which the load references until it returns.

    `shared`: the whole block is wanted, by any number of sequences, and will be registered; otherwise
    its head goes on in the private page of one sequence. `overdue` once nobody waits for it any more.
    A secret one was deleted on its way: those who wait get it, and nobody finds it after that.
    """

    namespace: Namespace
    link: Link
    page: int
    deadline: float
    shared: bool
    waiters: list[Sequence] = field(default_factory=list)
    overdue: bool = False
    is_secret: bool = False


class Loads:
    """The reads in flight. Each references its page until it returns, whoever still waits: a reader
    thread may write into the page until then. Owned by the engine thread; times are monotonic seconds."""

    def __init__(self, pool: Pool, store: BlockStore, timeout_s: float) -> None:
        self._pool = pool
        self._store = store
        self._timeout_s = timeout_s
        self._by_page: dict[int, Load] = {}
        self._shared: dict[BlockKey, Load] = {}
        self._new: list[Load] = []
        self.num_overdue = 0
        """Reads that nobody waits for any more and that have not returned."""
        self._unreadable: dict[BlockKey, float] = {}
        """Until when a block is not to be tried again, although the store has it."""

    def __len__(self) -> int:
        return len(self._by_page)

    @property
    def next_deadline(self) -> float | None:
        """When the next read is to be given up."""
        return min((load.deadline for load in self._by_page.values() if not load.overdue), default=None)

    def is_readable(self, key: BlockKey) -> bool:
        """Whether the store has the block and reading it has a chance."""
        return self._store.contains(key) and self._unreadable.get(key, 0.0) <= time.monotonic()

    def is_reading(self, key: BlockKey) -> bool:
        """Whether the whole block is being read for somebody, so that it needs no further page."""
        return key in self._shared

    def read_block(self, sequence: Sequence, link: Link, now: float) -> int:
        """Let `sequence` wait for a whole block, which is read once for all who want it; its page."""
        load = self._shared.get(link.key)
        if load is None:
            load = self._start(sequence, link, self._pool.allocate(), now, shared=True)
            self._shared[link.key] = load
        load.waiters.append(sequence)
        self._pool.share(load.page)
        return load.page

    def read_head(self, sequence: Sequence, link: Link, page: int, now: float) -> None:
        """Let `sequence` wait for a block whose head goes on in its private `page`."""
        self._pool.share(page)
        self._start(sequence, link, page, now, shared=False).waiters.append(sequence)

    def take_new(self) -> tuple[Load, ...]:
        """The reads to be started, once."""
        new, self._new = tuple(self._new), []
        return new

    def returned(self, load: Load, *, ok: bool) -> list[Sequence]:
        """A read returned. Good: those who wait for nothing else run. Bad: they are returned, to look
        again; the store has forgotten a damaged block, any other one is left alone for a while."""
        del self._by_page[load.page]
        self.num_overdue -= load.overdue
        self._unreadable.pop(load.link.key, None)
        if load.shared:
            del self._shared[load.link.key]
        waiters, load.waiters = load.waiters, []
        if ok:
            if load.shared and not load.is_secret:
                self._pool.register(load.page, load.namespace, load.link)
            for sequence in waiters:
                if not self._waits(sequence):
                    sequence.state = State.RUNNING
                    sequence.woken_at = sequence.woken_at or time.monotonic()
        elif self._store.contains(load.link.key):
            self._unreadable[load.link.key] = time.monotonic() + _RETRY_READ_S
            for sequence in waiters:
                sequence.reads = False  # it says nothing of the block: the next one would fail as well
        self._pool.free(load.page)
        return [] if ok else waiters

    def forget_blocks(self, keys: Container[BlockKey]) -> None:
        """Blocks that are on their way are not to be found when they come."""
        for load in self._by_page.values():
            load.is_secret |= load.link.key in keys

    def forget(self, sequence: Sequence) -> None:
        """The sequence waits no more; what it waited for still comes."""
        for load in self._by_page.values():
            if sequence in load.waiters:
                load.waiters.remove(sequence)

    def give_up(self, now: float) -> list[Sequence]:
        """The sequences that have waited too long for a read, and read no more; it is not tried until it
        returns."""
        self._unreadable = {key: until for key, until in self._unreadable.items() if until > now}
        late = [load for load in self._by_page.values() if not load.overdue and load.deadline <= now]
        for load in late:
            load.overdue = True
            self.num_overdue += 1
            self._unreadable[load.link.key] = math.inf
        if late:
            self._store.relieve_readers(self._timeout_s)
        waiting = list(dict.fromkeys(sequence for load in late for sequence in load.waiters))
        for sequence in waiting:
            sequence.reads = False
        return waiting

    def _start(self, sequence: Sequence, link: Link, page: int, now: float, *, shared: bool) -> Load:
        load = Load(sequence.namespace, link, page, now + self._timeout_s, shared)
        self._by_page[page] = load
        self._new.append(load)
        return load

    def _waits(self, sequence: Sequence) -> bool:
        return any(sequence in load.waiters for load in self._by_page.values())
