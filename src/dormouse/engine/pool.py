"""The page pool: which page holds which block, who uses it, and which goes next. Integers, no tensors.

A page moves between four states:

| state   | references | in the index | found in                                |
| ------- | ---------- | ------------ | --------------------------------------- |
| free    | 0          | no           | the free list                           |
| private | 1          | no           | the block table of the one who fills it |
| shared  | 1 or more  | yes          | block tables                            |
| idle    | 0          | yes          | an LRU list; its content is still good  |

`allocate` makes a private page (of a free one, else of the oldest idle one), `register` makes a private
page shared, `share` and `free` count references. What is registered is never written again: a sequence
that goes on after an unfinished block copies the head of that block to a page of its own.

There are two LRU lists: pages that only side requests used are cold, and go before the warm ones of main
conversations.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from dormouse.domain.blocks import BlockKey, Link, Namespace, Tokens, common_prefix

_Family = tuple[Namespace, BlockKey, int]
"""Namespace, parent key and first token: the blocks that could share a head."""


class Pool:
    """Accounts for `num_pages` pages, numbered from 0. Owned by the engine thread."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"an arena of {num_pages} pages is too small; two is the least")
        self.num_pages = num_pages
        self._references = [0] * num_pages
        # Popped from the end: low page numbers first, so a small load touches little memory.
        self._free = list(range(num_pages - 1, -1, -1))
        self._cold: OrderedDict[int, None] = OrderedDict()
        self._warm: OrderedDict[int, None] = OrderedDict()
        self._is_warm = [False] * num_pages
        self._content: dict[int, tuple[Namespace, Link]] = {}
        self._by_key: dict[BlockKey, int] = {}
        self._families: dict[_Family, dict[BlockKey, int]] = {}

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free and idle ones."""
        return len(self._free) + self.num_idle

    @property
    def num_idle(self) -> int:
        """Pages that hold a block nobody uses right now."""
        return len(self._cold) + len(self._warm)

    @property
    def num_used(self) -> int:
        """Pages that somebody references."""
        return self.num_pages - self.num_available

    def allocate(self) -> int:
        """A private page with one reference. Raises IndexError when none is available."""
        if self._free:
            page = self._free.pop()
        elif idle := self._cold or self._warm:
            page, _ = idle.popitem(last=False)
            self._forget(page)
        else:
            raise IndexError("no page is available")
        self._references[page] = 1
        self._is_warm[page] = False
        return page

    def share(self, page: int) -> None:
        """Add a reference to a page that is registered or referenced."""
        if self._references[page] == 0:
            del self._idle_list(page)[page]
        self._references[page] += 1

    def free(self, page: int, *, warm: bool = False) -> None:
        """Drop a reference. The last one makes a registered page idle and any other page free.

        A page that anybody ever freed as `warm` is evicted after those that nobody did.

        Free a block table from its tail: what is freed first is evicted first, and a chain is worth
        nothing behind a hole.
        """
        assert self._references[page] > 0, f"page {page} is freed more often than it was taken"
        self._references[page] -= 1
        self._is_warm[page] |= warm
        if self._references[page]:
            return
        if page in self._content:
            self._idle_list(page)[page] = None
        else:
            self._free.append(page)

    def register(self, page: int, namespace: Namespace, link: Link) -> bool:
        """Name the content of a private page. False when another page has that name already.

        The page then stays private and is freed with its last reference: its owner goes on with
        the page that it knows.
        """
        assert self._references[page] > 0, f"page {page} is registered but nobody owns it"
        assert page not in self._content, f"page {page} is registered twice"
        if link.key in self._by_key:
            return False
        self._content[page] = (namespace, link)
        self._by_key[link.key] = page
        self._families.setdefault(_family(namespace, link), {})[link.key] = page
        return True

    def find(self, key: BlockKey) -> int | None:
        """The page that holds the block named `key`."""
        return self._by_key.get(key)

    def match_head(
        self, namespace: Namespace, parent: BlockKey, tokens: Tokens
    ) -> tuple[int, Link, int] | None:
        """The block after `parent` with the longest head in common with `tokens` (not empty): its
        page, its link and that length."""
        best: tuple[int, Link, int] | None = None
        for page in self._families.get((namespace, parent, tokens[0]), {}).values():
            link = self._content[page][1]
            length = common_prefix(link.tokens, tokens)
            if best is None or length > best[2]:
                best = (page, link, length)
        return best

    def content(self, page: int) -> tuple[Namespace, Link]:
        """What a registered page holds."""
        return self._content[page]

    def is_idle(self, page: int) -> bool:
        """Whether the page holds a block that nobody uses right now."""
        return self._references[page] == 0 and page in self._content

    def forget(self, page: int) -> None:
        """Nobody finds the content of this registered page any more; those who use it go on."""
        is_idle = self.is_idle(page)
        self._forget(page)
        if is_idle:
            del self._idle_list(page)[page]
            self._free.append(page)

    def descendants(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """Blocks in pages that are among `keys` or come after one of them."""
        children: dict[BlockKey, list[BlockKey]] = {}
        for _, link in self._content.values():
            children.setdefault(link.parent, []).append(link.key)
        found: dict[BlockKey, None] = {}
        waiting = list(keys)
        while waiting:
            key = waiting.pop()
            if key not in found:
                found[key] = None
                waiting += children.get(key, ())
        return [key for key in found if key in self._by_key]

    def check(self) -> None:
        """Raise AssertionError when the books do not balance."""
        free, idle = set(self._free), {*self._cold, *self._warm}
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert not free & idle, "a page is both free and idle"
        assert not any(map(self._is_warm.__getitem__, self._cold)), "a warm page is among the cold ones"
        assert all(map(self._is_warm.__getitem__, self._warm)), "a cold page is among the warm ones"
        for page, references in enumerate(self._references):
            assert references >= 0, f"page {page} has {references} references"
            listed = page in free or page in idle
            assert listed == (references == 0), f"page {page}: {references} references, {listed=}"
            assert page not in free or page not in self._content, f"free page {page} has content"
            assert page not in idle or page in self._content, f"idle page {page} has no content"
        assert self._by_key == {link.key: page for page, (_, link) in self._content.items()}
        families: dict[_Family, dict[BlockKey, int]] = {}
        for page, (namespace, link) in self._content.items():
            families.setdefault(_family(namespace, link), {})[link.key] = page
        assert self._families == families, "the index of heads is not that of the content"

    def _idle_list(self, page: int) -> OrderedDict[int, None]:
        return self._warm if self._is_warm[page] else self._cold

    def _forget(self, page: int) -> None:
        namespace, link = self._content.pop(page)
        del self._by_key[link.key]
        family = _family(namespace, link)
        del self._families[family][link.key]
        if not self._families[family]:
            del self._families[family]


def _family(namespace: Namespace, link: Link) -> _Family:
    return (namespace, link.parent, link.tokens[0])
