"""A sequence's K and V as MLX computes on them: a copy of its pages, in a lane that grows as it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dormouse.runtimes.mlx.codec import Codec
from dormouse.runtimes.mlx.lanes import Lane, Lanes
from dormouse.runtimes.mlx.pages import Pages


@dataclass(slots=True)
class View:
    """K and V of positions 0 to `length` of one sequence, in its lane.

    `table` are the pages that hold the same, `generations` what they counted when this was so.
    """

    lane: Lane = field(default_factory=lambda: Lanes(1).take())
    length: int = 0
    table: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    generations: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @classmethod
    def gather(cls, pages: Pages, codec: Codec, table: Sequence[int], length: int) -> View:
        """The view of what `pages` hold of a sequence."""
        view = cls()
        if length:
            for layer in range(pages.cache.num_layers):
                view.lane.write(layer, 0, *codec.from_pages(pages.read_rows(table, length, layer)))
                mx.eval(view.lane.lanes.arrays())
        view.follow(pages, table, length)
        return view

    def follow(self, pages: Pages, table: Sequence[int], length: int) -> None:
        """From now on this view holds what these pages hold now."""
        self.table = np.array(table, np.int64)
        self.generations = pages.generations[self.table]
        self.length = length

    def holds(self, pages: Pages, table: NDArray[np.int64], length: int) -> bool:
        """Whether its first `length` positions are what `table` holds."""
        count = -(-length // pages.cache.block_size)
        return (
            length <= self.length
            and np.array_equal(self.table[:count], table[:count])
            and np.array_equal(self.generations[:count], pages.generations[table[:count]])
        )
