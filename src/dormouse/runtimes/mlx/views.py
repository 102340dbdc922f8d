"""Which view belongs to which sequence: found by the pages of a chunk, since a plan knows no sequences."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dormouse.domain.plan import Chunk
from dormouse.runtimes.mlx.codec import Codec
from dormouse.runtimes.mlx.pages import Pages
from dormouse.runtimes.mlx.view import View


class Views:
    """Views under the last page of their sequences, the longest unused first.

    A running sequence owns the page that it writes alone, so no two views want one place. A view that is
    not where its sequence looks for it costs a copy out of the pages, nothing else.
    """

    def __init__(self, pages: Pages, codec: Codec, budget_nbytes: int) -> None:
        """`budget_nbytes` bounds the lanes of views that no chunk of the last step used."""
        self._pages = pages
        self._codec = codec
        self._budget_nbytes = budget_nbytes
        self._by_page: OrderedDict[int, View] = OrderedDict()
        self._origins: dict[int, _Origin] = {}
        """Of pages whose head was copied: from where."""

    @property
    def nbytes(self) -> int:
        """Bytes of all lanes that views are in."""
        return sum(lanes.nbytes for lanes in {view.lane.lanes for view in self._by_page.values()})

    def __len__(self) -> int:
        return len(self._by_page)

    def take(self, chunk: Chunk) -> View:
        """The view of what is before the chunk, for `keep` to be given back after its step."""
        table = np.array(chunk.pages, np.int64)
        view = self._found(table, chunk.start) if chunk.start else None
        if view is None:
            return View.gather(self._pages, self._codec, chunk.pages, chunk.start)
        return view

    def keep(self, view: View, chunk: Chunk) -> None:
        """The view holds the chunk's tokens, and so do its pages."""
        view.follow(self._pages, chunk.pages, chunk.end)
        self._by_page.pop(chunk.pages[-1], None)
        self._by_page[chunk.pages[-1]] = view

    def copied(self, source: int, target: int, num_tokens: int) -> None:
        """The first rows of `target` are those of `source`: the view goes where the sequence goes on.

        Where the older sequence goes on, too, it makes itself another one.
        """
        now = self._pages.generations
        self._origins[target] = _Origin(source, num_tokens, int(now[source]), int(now[target]))

    def trim(self, num_used: int) -> int:
        """Drop the longest unused views beyond the budget, but not the `num_used` last ones.

        One that lies beside a used view goes at once: its lane is wanted. The bytes of those that stay.
        """
        views = list(self._by_page.items())
        num_idle = max(0, len(views) - num_used)
        homes = {view.lane.lanes for _, view in views[num_idle:]}
        for page, view in views[:num_idle]:
            if view.lane.lanes in homes:
                del self._by_page[page]
        while (nbytes := self.nbytes) > self._budget_nbytes and len(self._by_page) > num_used:
            self._by_page.popitem(last=False)
        return nbytes

    def clear(self) -> None:
        """Drop all."""
        self._by_page.clear()
        self._origins.clear()

    def _found(self, table: NDArray[np.int64], start: int) -> View | None:
        """The view that holds the first `start` positions of `table`, taken out."""
        written = start // self._pages.cache.block_size
        places = [int(page) for page in table[max(0, written - 1) : written + 1][::-1]]
        for page in places:
            view = self._by_page.get(page)
            if view is not None and view.holds(self._pages, table, start):
                del self._by_page[page]
                return view
        return self._from_origin(table, start)

    def _from_origin(self, table: NDArray[np.int64], start: int) -> View | None:
        """The view of the sequence that this one continues in a copy of its last page."""
        index, rows = divmod(start, self._pages.cache.block_size)
        target = int(table[index])
        origin = self._origins.pop(target, None)
        if origin is None or rows > origin.num_tokens or not origin.stands(self._pages, target):
            return None
        view = self._by_page.get(origin.page)
        original = table.copy()
        original[index] = origin.page
        if view is None or not view.holds(self._pages, original, start):
            return None
        return self._by_page.pop(origin.page)


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a page's first `num_tokens` rows came from, and what both pages counted then."""

    page: int
    num_tokens: int
    generation: int
    target_generation: int

    def stands(self, pages: Pages, target: int) -> bool:
        """Whether neither page was touched since."""
        now = pages.generations
        return bool(now[self.page] == self.generation and now[target] == self.target_generation)
