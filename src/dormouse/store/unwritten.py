"""Blocks that the disk did not take. They are written again, in their order, until it does."""

from __future__ import annotations

import time
from collections.abc import Iterable, Set

from dormouse.domain.blocks import BlockKey
from dormouse.store.index import Index
from dormouse.store.view import PendingBlock, StoreView

MAX_BATCH_BLOCKS = 32


class Unwritten:
    """Used by the writer thread alone.

    To the view these blocks are pending all the while: they can be loaded, and its bound on bytes holds for
    them. `retry_s` seconds pass after a failure before the next batch, of `max_batch_nbytes` at most.
    """

    def __init__(self, index: Index, view: StoreView, *, max_batch_nbytes: int, retry_s: float) -> None:
        self._index = index
        self._view = view
        self._max_batch_nbytes = max_batch_nbytes
        self._retry_s = retry_s
        self._retry_at = 0.0
        self._blocks: dict[BlockKey, PendingBlock] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def wait_s(self) -> float:
        """Seconds until the next batch; 0 when it is due."""
        return max(0.0, self._retry_at - time.monotonic())

    def hurry(self) -> None:
        """Let the next batch be due now: there may be no later."""
        self._retry_at = 0.0

    def add(self, blocks: Iterable[PendingBlock]) -> None:
        """These have just failed. The ones that fail again go behind those that were not tried."""
        self._blocks.update((block.link.key, block) for block in blocks)
        self._retry_at = time.monotonic() + self._retry_s

    def take(self) -> list[PendingBlock]:
        """The next batch, empty when none is due. Who takes it adds again what fails."""
        if not self._blocks or self.wait_s:
            return []
        # A tail that a longer block replaced meanwhile has nobody left who would release it.
        needed = self._needed()
        self._keep({key for key, block in self._blocks.items() if _is_full(block) or key in needed})
        batch: list[PendingBlock] = []
        nbytes = 0
        for key in list(self._blocks):
            nbytes += len(self._blocks[key].payload)
            if batch and (nbytes > self._max_batch_nbytes or len(batch) == MAX_BATCH_BLOCKS):
                break
            batch.append(self._blocks.pop(key))
        return batch

    def forget_unreached(self) -> None:
        """Something was deleted, and must not come back: keep only what somebody is known to need."""
        self._keep(self._needed())

    def _needed(self) -> Set[BlockKey]:
        return self._index.reachable(self._index.refs()) | self._view.unsaved_keys()

    def _keep(self, keys: Set[BlockKey]) -> None:
        """Forget all others, and those that were stored or removed meanwhile."""
        self._view.drop([key for key in self._blocks if key not in keys])
        self._blocks = {key: block for key, block in self._blocks.items() if self._view.find(key) is block}


def _is_full(block: PendingBlock) -> bool:
    return len(block.link.tokens) == block.format.cache.block_size
