"""Blocks that the disk did not take. They are written again until it does."""

from __future__ import annotations

import time
from collections.abc import Iterable, Set

from dormouse.domain.blocks import BlockKey
from dormouse.store.index import Index
from dormouse.store.view import PendingBlock, StoreView

MAX_BATCH_BLOCKS = 32


class Unwritten:
    """Used by the writer thread alone.

    To the view these blocks are pending all the while: they can be loaded, and count against its bound. Their
    payloads are `max_nbytes` at most, so that the queue has room for blocks that may be luckier; what is
    above it is dropped.

    A batch, of `max_batch_nbytes` at most, is due `retry_s` seconds after a failure. After one of which
    nothing was written a single block goes first, as a probe: a disk that is broken for long is not worn out.
    """

    def __init__(
        self, index: Index, view: StoreView, *, max_nbytes: int, max_batch_nbytes: int, retry_s: float
    ) -> None:
        self._index = index
        self._view = view
        self._max_nbytes = max_nbytes
        self._max_batch_nbytes = max_batch_nbytes
        self._retry_s = retry_s
        self._retry_at = 0.0
        self._probe = False
        self._num_in_round = 0
        self._blocks: dict[BlockKey, PendingBlock] = {}
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def is_due(self) -> bool:
        """Whether `take` has something now."""
        return bool(self._blocks) and (self._num_in_round > 0 or time.monotonic() >= self._retry_at)

    @property
    def in_round(self) -> bool:
        """Whether blocks are left of those that `begin_round` found."""
        return self._num_in_round > 0

    def begin_round(self, *, probe: bool) -> None:
        """Let each block that waits be tried once, now, until nothing of a batch is written."""
        self._num_in_round = len(self._blocks)
        self._probe = probe

    def add(self, blocks: Iterable[PendingBlock]) -> None:
        """These have just failed. They go behind those that were not tried; what is too much is dropped."""
        now = time.monotonic()
        if now >= self._retry_at:
            self._retry_at = now + self._retry_s
        for block in blocks:
            if self._nbytes + len(block.payload) > self._max_nbytes:
                self._view.drop([block.link.key])
            else:
                self._blocks[block.link.key] = block
                self._nbytes += len(block.payload)

    def take(self) -> list[PendingBlock]:
        """The next batch, empty when none is due. Who takes it adds again what fails, and calls `tried`."""
        if not self.is_due:
            return []
        # A tail that a longer block replaced meanwhile has nobody left who would release it.
        needed = self._needed()
        self._keep({key for key, block in self._blocks.items() if _is_full(block) or key in needed})
        batch: list[PendingBlock] = []
        nbytes = 0
        for key in list(self._blocks)[: 1 if self._probe else MAX_BATCH_BLOCKS]:
            nbytes += len(self._blocks[key].payload)
            if batch and nbytes > self._max_batch_nbytes:
                break
            batch.append(self._blocks.pop(key))
        self._nbytes -= sum(len(block.payload) for block in batch)
        self._num_in_round = max(0, min(self._num_in_round, len(self._blocks) + len(batch)) - len(batch))
        return batch

    def tried(self, *, in_vain: bool) -> None:
        """What became of a batch: whether nothing of it is on disk."""
        self._probe = in_vain
        if in_vain:
            self._num_in_round = 0

    def forget_unreached(self) -> None:
        """Something was deleted, and must not come back: keep only what somebody is known to need."""
        self._keep(self._needed())

    def _needed(self) -> Set[BlockKey]:
        return self._index.reachable(self._index.refs()) | self._view.unsaved_keys()

    def _keep(self, keys: Set[BlockKey]) -> None:
        """Forget all others, and those that were stored or removed meanwhile."""
        waiting = {key: block for key, block in self._blocks.items() if self._view.find(key) is block}
        self._view.drop([key for key in waiting if key not in keys])
        self._blocks = {key: block for key, block in waiting.items() if key in keys}
        self._nbytes = sum(len(block.payload) for block in self._blocks.values())


def _is_full(block: PendingBlock) -> bool:
    return len(block.link.tokens) == block.format.cache.block_size
