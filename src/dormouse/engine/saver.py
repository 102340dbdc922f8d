"""What goes to the store, and when: the one policy of persistence.

Full blocks go as they are sealed, whoever asked: any later request may match them. The unfinished tail
and the history go at the end of a reply, for named agents only: an anonymous tail would cost a block of
disk to save less than a block of computing. What the disk does not take the store tries again. What the
store does not take, because its queue is full or its quota too small, is offered again at the next end of a
reply.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from dormouse.domain.agents import AgentId, AgentUpdate
from dormouse.domain.blocks import Link
from dormouse.engine.sequence import Sequence
from dormouse.engine.step import Tail
from dormouse.runtimes.base import Runtime
from dormouse.store.block_store import BlockStore

log = logging.getLogger(__name__)


class Saver:
    """Moves page bytes from the runtime to the store. Never waits for the disk."""

    def __init__(self, runtime: Runtime, store: BlockStore) -> None:
        self._runtime = runtime
        self._store = store

    def save_blocks(self, sequence: Sequence, blocks: Iterable[tuple[int, Link]]) -> None:
        """Offer blocks that the store lacks. Their pages must still hold them."""
        for page, link in blocks:
            if self._store.contains(link.key):
                continue
            try:
                payload = self._runtime.read_page(page, len(link.tokens))
            except Exception:
                # A history is worth saving without its blocks, too.
                log.exception("blocks of request %s could not be read out to be saved", sequence.request.id)
                return
            self._store.put(sequence.namespace, link, payload)

    def save_tail(self, tail: Tail) -> None:
        """Offer an unfinished block, if it belongs to an agent."""
        if tail.sequence.request.agent is not None:
            self.save_blocks(tail.sequence, [(tail.page, tail.link)])

    def save_reply(
        self,
        sequence: Sequence,
        pages: list[int],
        tail: Tail | None,
        on_durable: Callable[[bool], None] | None,
    ) -> bool:
        """Save what a sequence leaves behind; `pages` was its block table.

        True when `on_durable` will be called, by the store's writer, once it is on disk or has failed.
        """
        # One that waits for pages has computed nothing, but its history is whole.
        in_pages = sequence.num_computed > 0
        links = sequence.links if in_pages else sequence.full_links()
        if in_pages:
            self.save_blocks(sequence, zip(pages, links, strict=False))
        if tail is not None:
            self.save_tail(tail)
            links.append(tail.link)
        request = sequence.request
        if request.agent is None:
            self._store.touch([link.key for link in links])
            return False
        self._store.save_agent(
            AgentUpdate(
                AgentId(request.tenant, request.agent, sequence.namespace),
                self._runtime.spec.name,
                tuple(links),
                tuple(sequence.tokens[sum(len(link.tokens) for link in links) :]),
            ),
            on_durable,
        )
        return on_durable is not None
