"""A sequence's K and V as MLX computes on them: a copy of its pages, grown as the sequence grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dormouse.runtimes.mlx.codec import Arrays, Codec
from dormouse.runtimes.mlx.pages import Pages

_STEP = 256
"""Tokens by which a view grows: growing copies it."""


@dataclass(slots=True)
class _Layer:
    keys: Arrays
    values: Arrays


@dataclass(slots=True)
class View:
    """K and V of positions 0 to `length` of one sequence, per layer.

    `table` are the pages that hold the same, `generations` what they counted when this was so. A layer's
    arrays are `[1, kv_heads, capacity, ...]`; a layer that was never written has none.
    """

    num_layers: int
    length: int = 0
    table: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    generations: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    _layers: list[_Layer] = field(default_factory=list)

    @classmethod
    def gather(cls, pages: Pages, codec: Codec, table: Sequence[int], length: int) -> View:
        """The view of what `pages` hold of a sequence."""
        view = cls(pages.cache.num_layers)
        if length:
            for layer in range(view.num_layers):
                keys, values = codec.from_pages(pages.read_rows(table, length, layer))
                view._layers.append(_Layer(_padded(keys, length), _padded(values, length)))
                mx.eval(keys, values, *view._layers[-1].keys, *view._layers[-1].values)
        view.follow(pages, table, length)
        return view

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' arrays."""
        return sum(part.nbytes for part in self.arrays())

    def arrays(self) -> list[mx.array]:
        """All of them."""
        return [part for layer in self._layers for part in (*layer.keys, *layer.values)]

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

    def write(self, layer: int, start: int, keys: Arrays, values: Arrays) -> None:
        """Put new tokens, `[1, kv_heads, tokens, ...]`, behind the first `start` ones."""
        if layer == len(self._layers):
            self._layers.append(_Layer(_empty(keys), _empty(values)))
        own = self._layers[layer]
        own.keys = tuple(_written(part, new, start) for part, new in zip(own.keys, keys, strict=True))
        own.values = tuple(_written(part, new, start) for part, new in zip(own.values, values, strict=True))

    def read(self, layer: int, start: int, end: int) -> tuple[Arrays, Arrays]:
        """Keys and values of the positions from `start` to `end`."""
        own = self._layers[layer]
        keys = tuple(part[..., start:end, :] for part in own.keys)
        values = tuple(part[..., start:end, :] for part in own.values)
        return keys, values


def _empty(parts: Arrays) -> Arrays:
    return tuple(mx.zeros((*part.shape[:2], 0, part.shape[3]), part.dtype) for part in parts)


def _padded(parts: Arrays, length: int) -> Arrays:
    return tuple(_grown(part, length, 1) for part in parts)


def _written(array: mx.array, new: mx.array, start: int) -> mx.array:
    end = start + new.shape[2]
    if end > array.shape[2]:
        array = _grown(array, start, end - start)
    # Assigned in place: MLX reuses the memory, as nothing else holds the array any more.
    array[..., start:end, :] = new
    return array


def _grown(array: mx.array, length: int, more: int) -> mx.array:
    """Room for `more` tokens behind `length`."""
    room = -(-(length + more) // _STEP) * _STEP - length
    space = mx.zeros((*array.shape[:2], room, array.shape[3]), array.dtype)
    return mx.concatenate((array[..., :length, :], space), axis=2)
