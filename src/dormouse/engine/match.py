"""What is known of a sequence's past, in memory and in the store."""

from __future__ import annotations

from dataclasses import dataclass, field

from dormouse.domain.blocks import ROOT, BlockKey, Link, common_prefix
from dormouse.engine.loads import Loads
from dormouse.engine.pool import Pool
from dormouse.engine.sequence import Sequence
from dormouse.store.block_store import BlockStore


@dataclass(slots=True)
class Match:
    """Whole blocks, then the head of one more.

    `pages` has a page per whole block, None where the block is only in the store.
    """

    pages: list[int | None] = field(default_factory=list)
    head: Link | None = None
    head_page: int | None = None
    head_tokens: int = 0


class Matcher:
    """Owned by the engine thread."""

    def __init__(self, pool: Pool, store: BlockStore, loads: Loads) -> None:
        self._pool = pool
        self._store = store
        self._loads = loads

    def match(self, sequence: Sequence) -> Match:
        """The longest known prefix, short of the last token, whose logits are still to be computed."""
        match = Match()
        size = sequence.block_size
        limit = len(sequence.tokens) - 1
        parent = ROOT
        for index in range(limit // size):
            key = sequence.link(index).key
            page = self._pool.find(key)
            if page is None and not (sequence.reads and self._loads.is_readable(key)):
                break
            match.pages.append(page)
            parent = key
        start = len(match.pages) * size
        rest = sequence.tokens[start : min(limit, start + size)]
        if rest:
            self._match_head(match, sequence, parent, rest)
        return match

    def to_load(self, sequence: Sequence) -> list[BlockKey]:
        """Blocks of a waiting sequence that only the store has now."""
        match = self.match(sequence)
        keys = [sequence.link(index).key for index, page in enumerate(match.pages) if page is None]
        if match.head is not None and match.head_page is None:
            keys.append(match.head.key)
        return keys

    def _match_head(self, match: Match, sequence: Sequence, parent: BlockKey, rest: list[int]) -> None:
        """The block after `parent` with the longest head in common with `rest`; memory before disk."""
        namespace = sequence.namespace
        found = self._pool.match_head(namespace, parent, rest)
        if found is not None:
            match.head_page, match.head, match.head_tokens = found
        if not sequence.reads:
            return
        for link in self._store.children(namespace, parent, rest[0]):
            length = common_prefix(link.tokens, rest)
            if length > match.head_tokens and self._loads.is_readable(link.key):
                match.head, match.head_page, match.head_tokens = link, None, length
