"""K and V of sequences side by side, so that one operation of MLX attends to all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
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


class Lanes:
    """Arrays per layer, in which each lane is a sequence's. A layer that was never written has none.

    All lanes are as long as the longest.
    """

    def __init__(self, count: int, room: int = 0) -> None:
        """Empty, and free; layers will have room for more than `room` tokens from the start."""
        self._count = count
        self._room = room
        self._layers: list[_Layer] = []
        self._taken: WeakValueDictionary[int, Lane] = WeakValueDictionary()
        self._used: set[int] = set()

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
        return [part for layer in self._layers for part in (*layer.keys, *layer.values)]

    def has_room(self, length: int) -> bool:
        """Whether lanes hold so many tokens without growing."""
        return bool(self._layers) and length < self._layers[0].keys[0].shape[2]

    def take(self) -> Lane:
        """A free lane, for as long as it is held; there must be one.

        What somebody left there is cleared: a NaN would reach the sum over values with a weight of 0.
        """
        index = min(index for index in range(self._count) if index not in self._taken)
        if index in self._used:
            for part in self.arrays():
                part[index] = 0
        self._used.add(index)
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
        """A copy of the first `length` tokens of a lane from elsewhere, in a free lane of this."""
        own = self.take()
        for layer in range(len(lane.lanes._layers)):
            own.write(layer, 0, *lane.read(layer, 0, length))
            mx.eval(self._layers[layer].keys, self._layers[layer].values)
        mx.eval(self.arrays())
        return own

    def _empty(self, parts: Arrays) -> Arrays:
        shapes = [(self._count, part.shape[1], 0, part.shape[3]) for part in parts]
        empty = (mx.zeros(shape, part.dtype) for shape, part in zip(shapes, parts, strict=True))
        return tuple(_grown(part, self._room) for part in empty)


@dataclass(eq=False, slots=True, weakref_slot=True)
class Lane:
    """One sequence's place in lanes. It is free again once nobody holds this."""

    lanes: Lanes
    index: int

    def write(self, layer: int, start: int, keys: Arrays, values: Arrays) -> None:
        """Put new tokens, `[1, kv_heads, tokens, ...]`, behind the first `start` ones."""
        self.lanes.write(layer, _Stretch(self.index, start), keys, values)

    def read(self, layer: int, start: int, end: int) -> tuple[Arrays, Arrays]:
        """Keys and values of the positions from `start` to `end`, `[1, kv_heads, tokens, ...]`."""
        return self.lanes.read(layer, slice(self.index, self.index + 1), slice(start, end))


class Place(Protocol):
    """Where new tokens go."""

    def put(self, array: mx.array, new: mx.array) -> mx.array:
        """`array` with them, grown if there was no room."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """One lane, from one position on."""

    lane: int
    start: int

    def put(self, array: mx.array, new: mx.array) -> mx.array:
        end = self.start + new.shape[2]
        array = _grown(array, end)
        # Assigned in place: MLX reuses the memory, as nothing else holds the array any more.
        array[self.lane : self.lane + 1, :, self.start : end] = new
        return array


class Scattered:
    """Single tokens, each in a lane and at a position of its own."""

    def __init__(self, tokens: Sequence[tuple[int, int]]) -> None:
        """Of each token its lane and its position."""
        lanes, positions = zip(*tokens, strict=True)
        self._end = max(positions) + 1
        self._lanes = mx.array(lanes)
        self._positions = mx.array(positions)

    def put(self, array: mx.array, new: mx.array) -> mx.array:
        """`new` is `[tokens, kv_heads, 1, ...]`."""
        array = _grown(array, self._end)
        array[self._lanes, :, self._positions] = new.squeeze(2)
        return array


def side_by_side(lanes: Sequence[Lane], lengths: Sequence[int], end: int) -> list[Lane]:
    """Lanes of one and the same `Lanes` that hold what these do, `lengths` tokens each, in their order.

    Where most of them are, the others are copied to, so that a sequence that takes the place of another costs
    a copy of that one. All are copied to new ones if there is no room for so many, if most lanes there are
    free, or if there is none for `end` tokens: lanes that are not of these would grow in vain.
    """
    home = Counter(lane.lanes for lane in lanes).most_common(1)[0][0]
    strangers = sum(lane.lanes is not home for lane in lanes)
    left_free = home.num_free - strangers
    grows_in_vain = len(home) > len(lanes) and not home.has_room(end)
    if left_free < 0 or left_free > len(lanes) or grows_in_vain:
        home = Lanes(len(lanes), end)
    return [
        lane if lane.lanes is home else home.adopt(lane, length)
        for lane, length in zip(lanes, lengths, strict=True)
    ]


def by_itself(lane: Lane, length: int, end: int) -> Lane:
    """A lane with the same `length` tokens that may grow to `end` without making others grow."""
    if len(lane.lanes) == 1 or lane.lanes.has_room(end):
        return lane
    return Lanes(1, end).adopt(lane, length)


def _grown(array: mx.array, length: int) -> mx.array:
    """With room for `length` tokens and another one, as they come one by one."""
    room = (length // _STEP + 1) * _STEP - array.shape[2]
    if room <= 0:
        return array
    space = mx.zeros((*array.shape[:2], room, *array.shape[3:]), array.dtype)
    return mx.concatenate([array, space], axis=2)
