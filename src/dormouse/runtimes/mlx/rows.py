"""The rows of one call as attention takes them: sequences of like length together, others alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from dormouse.runtimes.mlx.attention import Attention, mask_of, rows_mask
from dormouse.runtimes.mlx.codec import Arrays
from dormouse.runtimes.mlx.lanes import Lanes, Scattered, by_itself, side_by_side
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
    """A row whose sequence is attended to by itself: nothing is padded, nor masked that can be sliced off."""

    def __init__(self, row: Row, length: int) -> None:
        row.view.lane = by_itself(row.view.lane, row.start, row.end)
        self._row = row
        self._missing = length - row.count

    def __len__(self) -> int:
        return 1

    def write(self, layer: int, keys: Arrays, values: Arrays) -> None:
        """Store `[1, kv_heads, length, ...]` of its tokens; those that pad the call are left out."""
        row = self._row
        own = [tuple(part[:, :, : row.count] for part in half) for half in (keys, values)]
        row.view.lane.write(layer, row.start, own[0], own[1])

    def attend(self, layer: int, queries: mx.array, window: int | None, attention: Attention) -> mx.array:
        """Queries `[1, heads, length, k_head_dim]`; the result is as long, zeros where it was padded."""
        row = self._row
        first = 0 if window is None else max(0, row.start - window + 1)
        keys, values = row.view.lane.read(layer, first, row.end)
        mask = mask_of(row.count, row.end - first, window)
        out = attention(queries[:, :, : row.count], keys, values, mask)
        return mx.pad(out, [(0, 0), (0, 0), (0, self._missing), (0, 0)]) if self._missing else out


@dataclass(slots=True)
class Together:
    """Rows whose sequences lie side by side: the same few operations, however many they are."""

    rows: Sequence[Row]
    length: int
    """Tokens per row of the call."""

    _lanes: Lanes = field(init=False)
    _place: Scattered = field(init=False)
    _order: list[int] = field(init=False)
    """For each lane, its row; that of a lane without one is attended to in vain."""

    _back: list[int] = field(init=False)
    """For each row, its lane."""

    _starts: list[int] = field(init=False)
    _masks: dict[int | None, mx.array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        starts = [row.start for row in self.rows]
        end = max(starts) + self.length
        lanes = side_by_side([row.view.lane for row in self.rows], starts, end)
        for row, lane in zip(self.rows, lanes, strict=True):
            row.view.lane = lane
        self._lanes = lanes[0].lanes
        self._place = Scattered([lane.index for lane in lanes], starts, self.length)
        row_of = {lane.index: number for number, lane in enumerate(lanes)}
        self._order = [row_of.get(index, 0) for index in range(len(self._lanes))]
        self._starts = [starts[number] for number in self._order]
        self._back = [lane.index for lane in lanes]

    def __len__(self) -> int:
        return len(self.rows)

    def write(self, layer: int, keys: Arrays, values: Arrays) -> None:
        """Store `[rows, kv_heads, length, ...]`; what pads a row lies behind its end, where nobody looks."""
        self._lanes.write(layer, self._place, keys, values)

    def attend(self, layer: int, queries: mx.array, window: int | None, attention: Attention) -> mx.array:
        """Queries `[rows, heads, length, k_head_dim]`."""
        end = max(self._starts) + self.length
        first = 0 if window is None else max(0, min(self._starts) - window + 1)
        keys, values = self._lanes.read(layer, slice(None), slice(first, end))
        if window not in self._masks:
            self._masks[window] = rows_mask(self._starts, self.length, first, end, window)
        out = attention(_taken(queries, self._order), keys, values, self._masks[window])
        return _taken(out, self._back)


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


def seat(groups: Sequence[Sequence[Row]], length: int) -> list[Alone | Together]:
    """Bring each group's views where they can be attended to; `length` tokens are computed for each row."""
    return [Together(group, length) if len(group) > 1 else Alone(group[0], length) for group in groups]


def _taken(array: mx.array, order: list[int]) -> mx.array:
    return array if order == list(range(len(array))) else array[mx.array(order)]
