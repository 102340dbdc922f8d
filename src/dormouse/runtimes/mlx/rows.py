"""One call's sequences as attention takes them: those of like length together, others alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from dormouse.runtimes.mlx.attention import Attention, mask_of, rows_mask
from dormouse.runtimes.mlx.codec import Arrays
from dormouse.runtimes.mlx.lanes import Scattered, by_itself, side_by_side
from dormouse.runtimes.mlx.view import View

_WORTH_NBYTES = 2 << 20
"""Bytes of padding, per row and layer, that cost about as much time as a row's own operations."""


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence's part of a call: `count` tokens behind the first `start` ones."""

    view: View
    start: int
    count: int

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + self.count


class Alone:
    """A sequence that is attended to by itself: nothing is padded, nor masked that can be sliced off.

    Its tokens are one row of the call, or, where it is `spread`, a row each.
    """

    def __init__(self, row: Row, spread: bool) -> None:
        row.view.lane = by_itself(row.view.lane, row.start, row.end)
        self._row = row
        self._turned = spread and row.count > 1
        self.num_rows = row.count if spread else 1

    def write(self, layer: int, keys: Arrays, values: Arrays) -> None:
        """Store `[rows, kv_heads, tokens, ...]`."""
        own = [tuple(map(self._turn, half)) for half in (keys, values)]
        self._row.view.lane.write(layer, self._row.start, own[0], own[1])

    def attend(self, layer: int, queries: mx.array, window: int | None, attention: Attention) -> mx.array:
        """Queries `[rows, heads, tokens, k_head_dim]`."""
        row = self._row
        first = 0 if window is None else max(0, row.start - window + 1)
        keys, values = row.view.lane.read(layer, first, row.end)
        mask = mask_of(row.count, row.end - first, window)
        return self._turn(attention(self._turn(queries), keys, values, mask))

    def _turn(self, array: mx.array) -> mx.array:
        """Tokens as rows, or rows as tokens."""
        return array.swapaxes(0, 2) if self._turned else array


class Together:
    """Sequences that lie side by side: the same operations, however many they are. Each token is a row."""

    def __init__(self, rows: Sequence[Row]) -> None:
        end = max(row.end for row in rows)
        lanes = side_by_side([row.view.lane for row in rows], [row.start for row in rows], end)
        for row, lane in zip(rows, lanes, strict=True):
            row.view.lane = lane
        self._lanes = lanes[0].lanes
        self._end = end
        self._first = min(row.start for row in rows)
        self._masks: dict[int | None, mx.array] = {}
        tokens = [
            (lane.index, position)
            for row, lane in zip(rows, lanes, strict=True)
            for position in range(row.start, row.end)
        ]
        self.num_rows = len(tokens)
        self._place = Scattered(tokens)
        self._width = max(row.count for row in rows)
        self._order, self._back = self._queries_of(rows, [lane.index for lane in lanes])
        self._positions = [tokens[row][1] for row in self._order]

    def write(self, layer: int, keys: Arrays, values: Arrays) -> None:
        """Store `[rows, kv_heads, 1, ...]`."""
        self._lanes.write(layer, self._place, keys, values)

    def attend(self, layer: int, queries: mx.array, window: int | None, attention: Attention) -> mx.array:
        """Queries `[rows, heads, 1, k_head_dim]`."""
        first = 0 if window is None else max(0, self._first - window + 1)
        keys, values = self._lanes.read(layer, slice(None), slice(first, self._end))
        if window not in self._masks:
            own = mx.array(self._positions).reshape(len(self._lanes), self._width)
            self._masks[window] = rows_mask(own, first, self._end, window)
        by_lane = _taken(queries, self._order)
        if self._width > 1:
            by_lane = by_lane.reshape(-1, self._width, *queries.shape[1::2]).swapaxes(1, 2)
        out = attention(by_lane, keys, values, self._masks[window])
        if self._width > 1:
            out = out.swapaxes(1, 2).reshape(-1, out.shape[1], 1, out.shape[3])
        return _taken(out, self._back)

    def _queries_of(self, rows: Sequence[Row], lanes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Which rows each lane attends with, `width` of them, and where each row is among these.

        A short sequence repeats its last one, and a lane without a sequence attends in vain.
        """
        order = [0] * (len(self._lanes) * self._width)
        back: list[int] = []
        for row, lane in zip(rows, lanes, strict=True):
            place, first = lane * self._width, len(back)
            for number in range(self._width):
                order[place + number] = first + min(number, row.count - 1)
            back += range(place, place + row.count)
        return order, back


def alike(rows: Sequence[Row], token_nbytes: int) -> list[list[Row]]:
    """Rows, in order of their ends, by like length: a function of the call, not of where its lanes are.

    `token_nbytes` are those of a token's K and V in one layer. What a group is padded by costs less than
    attending to each of its rows alone would.
    """
    groups: list[list[Row]] = []
    padding = 0
    for row in rows:
        if groups:
            more = (row.end - groups[-1][-1].end) * len(groups[-1])
            if (padding + more) * token_nbytes <= _WORTH_NBYTES * len(groups[-1]):
                padding += more
                groups[-1].append(row)
                continue
        groups.append([row])
        padding = 0
    return groups


def seat(groups: Sequence[Sequence[Row]], spread: bool) -> list[Alone | Together]:
    """Bring each group's views where they can be attended to."""
    return [Together(group) if len(group) > 1 else Alone(group[0], spread) for group in groups]


def _taken(array: mx.array, order: list[int]) -> mx.array:
    return array if order == list(range(len(array))) else array[mx.array(order)]
