"""Which agents' blocks are in the arena, changed from outside: put to sleep, or made to be found no more."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from dormouse.domain.blocks import BlockKey
from dormouse.engine.loads import Loads
from dormouse.engine.pool import Pool
from dormouse.runtimes.base import Runtime
from dormouse.store.block_store import BlockStore


class Residence:
    """Owned by the engine thread. Nothing here waits, and no page in use is taken from its user."""

    def __init__(self, pool: Pool, loads: Loads, runtime: Runtime, store: BlockStore) -> None:
        self._pool = pool
        self._loads = loads
        self._runtime = runtime
        self._store = store

    def offer(self, keys: Iterable[BlockKey]) -> None:
        """Give the store those blocks of idle pages that it lacks."""
        for page in self._idle(keys):
            namespace, link = self._pool.content(page)
            if not self._store.contains(link.key):
                self._store.put(namespace, link, self._runtime.read_page(page, len(link.tokens)))

    def release(self, keys: Iterable[BlockKey]) -> int:
        """Free the idle pages of those blocks that are on disk; how many."""
        pages = [page for page in self._idle(keys) if self._is_durable(page)]
        for page in pages:
            self._pool.forget(page)
        return len(pages)

    def forget(self, keys: Collection[BlockKey]) -> int:
        """Let nobody find these blocks any more, nor what follows them; how many pages held one.

        Whoever uses such a page right now goes on with it and frees it at the end.
        """
        found = self._pool.descendants(keys)
        for key in found:
            page = self._pool.find(key)
            assert page is not None, "descendants are in pages"
            self._pool.forget(page)
        self._loads.forget_blocks({*keys, *found})
        return len(found)

    def _idle(self, keys: Iterable[BlockKey]) -> list[int]:
        pages = [page for key in keys if (page := self._pool.find(key)) is not None]
        return [page for page in pages if self._pool.is_idle(page)]

    def _is_durable(self, page: int) -> bool:
        return self._store.has_durable(self._pool.content(page)[1].key)
