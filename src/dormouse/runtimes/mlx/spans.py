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
"""Bytes of padding, per sequence and layer, that cost about as much time as its own operations."""


@dataclass(frozen=True, slots=True)
class Span:
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

    def __init__(self, span: Span, spread: bool) -> None:
        span.view.lane = by_itself(span.view.lane, span.start, span.end)
        self._span = span
        self._turned = spread and span.count > 1
        self.num_rows = span.count if spread else 1

    def write(self, layer: int, keys: Arrays, values: Arrays) -> None:
        """Store `[rows, kv_heads, tokens, ...]`."""
        own = [tuple(map(self._turn, half)) for half in (keys, values)]
        self._span.view.lane.write(layer, self._span.start, own[0], own[1])

    def attend(self, layer: int, queries: mx.array, window: int | None, attention: Attention) -> mx.array:
        """Queries `[rows, heads, tokens, k_head_dim]`."""
        span = self._span
        first = 0 if window is None else max(0, span.start - window + 1)
        keys, values = span.view.lane.read(layer, first, span.end)
        mask = mask_of(span.count, span.end - first, window)
        return self._turn(attention(self._turn(queries), keys, values, mask))

    def _turn(self, array: mx.array) -> mx.array:
        """Tokens as rows, or rows as tokens."""
        return array.swapaxes(0, 2) if self._turned else array


class Together:
    """Sequences that lie side by side: the same operations, however many they are. Each token is a row."""

    def __init__(self, spans: Sequence[Span]) -> None:
        end = max(span.end for span in spans)
        lanes = side_by_side([span.view.lane for span in spans], [span.start for span in spans], end)
        for span, lane in zip(spans, lanes, strict=True):
            span.view.lane = lane
        self._lanes = lanes[0].lanes
        self._first = min(span.start for span in spans)
        self._end = end
        self._width = max(span.count for span in spans)
        self._masks: dict[int | None, mx.array] = {}
        tokens = [
            (lane.index, position)
            for span, lane in zip(spans, lanes, strict=True)
            for position in range(span.start, span.end)
        ]
        self.num_rows = len(tokens)
        self._place = Scattered(tokens)
        rows, places = self._queries_of(spans, [lane.index for lane in lanes])
        own = mx.array([tokens[row][1] for row in rows])
        self._positions = own.reshape(len(self._lanes), self._width)
        self._rows = _order(rows, len(tokens))
        self._places = _order(places, len(rows))

    def write(self, layer: int, keys: Arrays, values: Arrays) -> None:
        """Store `[rows, kv_heads, 1, ...]`."""
        self._lanes.write(layer, self._place, keys, values)

    def attend(self, layer: int, queries: mx.array, window: int | None, attention: Attention) -> mx.array:
        """Queries `[rows, heads, 1, k_head_dim]`."""
        first = 0 if window is None else max(0, self._first - window + 1)
        keys, values = self._lanes.read(layer, slice(None), slice(first, self._end))
        if window not in self._masks:
            self._masks[window] = rows_mask(self._positions, first, self._end, window)
        by_lane = queries if self._rows is None else queries[self._rows]
        if self._width > 1:
            by_lane = by_lane.reshape(-1, self._width, *queries.shape[1::2]).swapaxes(1, 2)
        out = attention(by_lane, keys, values, self._masks[window])
        if self._width > 1:
            out = out.swapaxes(1, 2).reshape(-1, out.shape[1], 1, out.shape[3])
        return out if self._places is None else out[self._places]

    def _queries_of(self, spans: Sequence[Span], lanes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Which rows each lane attends with, `width` of them, and where each row is among these.

        A short span repeats its last row, and a lane without a span attends in vain.
        """
        rows = [0] * (len(self._lanes) * self._width)
        places: list[int] = []
        for span, lane in zip(spans, lanes, strict=True):
            place, first = lane * self._width, len(places)
            for number in range(self._width):
                rows[place + number] = first + min(number, span.count - 1)
            places += range(place, place + span.count)
        return rows, places


def alike(spans: Sequence[Span], token_nbytes: int) -> list[list[Span]]:
    """Spans, in order of their ends, by like length: a function of the call, not of where its lanes are.

    `token_nbytes` are those of a token's K and V in one layer. What a group is padded by costs less than
    attending to each of its sequences alone would.
    """
    groups: list[list[Span]] = []
    padding = 0
    for span in spans:
        if groups:
            more = (span.end - groups[-1][-1].end) * len(groups[-1])
            if (padding + more) * token_nbytes <= _WORTH_NBYTES * len(groups[-1]):
                padding += more
                groups[-1].append(span)
                continue
        groups.append([span])
        padding = 0
    return groups


def seat(groups: Sequence[Sequence[Span]], spread: bool) -> list[Alone | Together]:
    """Bring each group's views where they can be attended to; `spread`: each token is a row of the call."""
    return [Together(group) if len(group) > 1 else Alone(group[0], spread) for group in groups]


def _order(indices: list[int], count: int) -> mx.array | None:
    """Indices into `count` things; None where they are all of them as they are."""
    return None if indices == list(range(count)) else mx.array(indices)
