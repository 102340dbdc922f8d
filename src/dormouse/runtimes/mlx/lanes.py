"""K and V of sequences side by side, so that one operation of MLX attends to all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import mlx.core as mx

from dormouse.runtimes.mlx.codec import Arrays

_STEP = 256
"""Tokens by which lanes grow: growing copies them."""


@dataclass(slots=True)
class _Layer:
    """Keys and values, each part `[lanes, kv_heads, capacity, ...]`."""

    keys: Arrays
    values: Arrays

    @property
    def arrays(self) -> Arrays:
        return (*self.keys, *self.values)


class Lanes:
    """Arrays per layer, in which each lane is a sequence's. A layer that was never written has none."""

    def __init__(self, count: int) -> None:
        """Empty, and free."""
        self._count = count
        self._layers: list[_Layer] = []
        self._taken: WeakValueDictionary[int, Lane] = WeakValueDictionary()

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' arrays."""
        return sum(part.nbytes for part in self.arrays())

    @property
    def num_free(self) -> int:
        """Lanes that nobody holds."""
        return self._count - len(self._taken)

    def arrays(self) -> list[mx.array]:
        """All of them."""
        return [part for layer in self._layers for part in layer.arrays]

    def take(self) -> Lane:
        """A free lane, for as long as it is held; there must be one. What is in it is undefined."""
        index = min(index for index in range(self._count) if index not in self._taken)
        lane = self._taken[index] = Lane(self, index)
        return lane

    def write(self, layer: int, place: Place, keys: Arrays, values: Arrays) -> None:
        """Put new tokens into some lanes."""
        if layer == len(self._layers):
            self._layers.append(_Layer(self._empty(keys), self._empty(values)))
        own = self._layers[layer]
        own.keys = tuple(place.put(part, new) for part, new in zip(own.keys, keys, strict=True))
        own.values = tuple(place.put(part, new) for part, new in zip(own.values, values, strict=True))

    def read(self, layer: int, lanes: slice, tokens: slice) -> tuple[Arrays, Arrays]:
        """Keys and values of those lanes at those positions."""
        own = self._layers[layer]
        keys, values = (tuple(part[lanes, :, tokens] for part in half) for half in (own.keys, own.values))
        return keys, values

    def adopt(self, lane: Lane, length: int) -> Lane:
        """A copy of the first `length` tokens of a lane from elsewhere, in a free lane of this.

        What somebody left behind them is cleared: a NaN would reach the sum over values with a weight of 0.
        """
        own = self.take()
        for part in self.arrays():
            part[own.index] = 0
        for layer in range(len(lane.lanes._layers)):
            own.write(layer, 0, *lane.read(layer, 0, length))
            mx.eval(self._layers[layer].arrays)
        mx.eval(self.arrays())
        return own

    def _empty(self, parts: Arrays) -> Arrays:
        return tuple(mx.zeros((self._count, part.shape[1], 0, part.shape[3]), part.dtype) for part in parts)


@dataclass(eq=False, slots=True, weakref_slot=True)
class Lane:
    """One sequence's place in lanes. It is free again once nobody holds this."""

    lanes: Lanes
    index: int

    def write(self, layer: int, start: int, keys: Arrays, values: Arrays) -> None:
        """Put new tokens, `[1, kv_heads, tokens, ...]`, behind the first `start` ones."""
        self.lanes.write(layer, _Span(self.index, start), keys, values)

    def read(self, layer: int, start: int, end: int) -> tuple[Arrays, Arrays]:
        """Keys and values of the positions from `start` to `end`, `[1, kv_heads, tokens, ...]`."""
        return self.lanes.read(layer, slice(self.index, self.index + 1), slice(start, end))


class Place:
    """Where new tokens go."""

    def put(self, array: mx.array, new: mx.array) -> mx.array:
        """`array` with them, grown if there was no room."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Span(Place):
    """One lane, from one position on."""

    lane: int
    start: int

    def put(self, array: mx.array, new: mx.array) -> mx.array:
        end = self.start + new.shape[2]
        array = grown(array, end)
        # Assigned in place: MLX reuses the memory, as nothing else holds the array any more.
        array[self.lane : self.lane + 1, :, self.start : end] = new
        return array


class Scattered(Place):
    """A row of tokens in each of several lanes, from another position on in each."""

    def __init__(self, lanes: list[int], starts: list[int], count: int) -> None:
        self._end = max(starts) + count
        self._lanes = mx.array(lanes)[:, None]
        self._positions = mx.array(starts)[:, None] + mx.arange(count)[None]

    def put(self, array: mx.array, new: mx.array) -> mx.array:
        """`new` is `[lanes, kv_heads, count, ...]`."""
        array = grown(array, self._end)
        array[self._lanes, :, self._positions] = new.swapaxes(1, 2)
        return array


def side_by_side(lanes: Sequence[Lane], lengths: Sequence[int]) -> list[Lane]:
    """Lanes of one and the same `Lanes` that hold what these do, in their order.

    Where most of them are together already, the others are copied to where those are; if there is no room,
    all are copied. So a batch that a sequence joins in the place of another costs a copy of that one.
    """
    home = Counter(lane.lanes for lane in lanes).most_common(1)[0][0]
    strangers = sum(lane.lanes is not home for lane in lanes)
    if strangers > home.num_free or len(home) > 2 * len(lanes):
        home = Lanes(len(lanes))
    moved = list(lanes)
    # The longest first: what they are copied into grows once.
    for index in sorted(range(len(lanes)), key=lambda index: -lengths[index]):
        if lanes[index].lanes is not home:
            moved[index] = home.adopt(lanes[index], lengths[index])
    return moved


def grown(array: mx.array, length: int) -> mx.array:
    """With room for `length` tokens."""
    room = -(-length // _STEP) * _STEP - array.shape[2]
    if room <= 0:
        return array
    space = mx.zeros((*array.shape[:2], room, *array.shape[3:]), array.dtype)
    return mx.concatenate([array, space], axis=2)
