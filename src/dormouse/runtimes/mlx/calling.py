"""One call of a model: rows of several sequences in, logits and what is to be stored out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from dormouse.domain.cache_spec import CacheSpec
from dormouse.domain.plan import Chunk
from dormouse.runtimes.base import Logits
from dormouse.runtimes.mlx.codec import Codec
from dormouse.runtimes.mlx.head import halves
from dormouse.runtimes.mlx.layer_cache import Call
from dormouse.runtimes.mlx.model import Loaded
from dormouse.runtimes.mlx.pages import Parts
from dormouse.runtimes.mlx.rows import Row, alike, seat
from dormouse.runtimes.mlx.view import View

_LONG = 16
"""Tokens from which on a chunk is a call of its own."""

_PADDING = 6
"""Rows of padding that cost about as much as reading the weights once more."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a model can be called, from best to plainest; see `probe.py`.

    `routed`: attention is ours. `batched`: positions may differ within a call. `halved`: logits are made of
    wanted rows alone.
    """

    routed: bool
    batched: bool
    halved: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """`logits` are fp32 `[wanted, vocab_size]` in the order of the rows; K and V as `Codec.to_pages`."""

    logits: Logits
    halves: tuple[Parts, Parts]
    attended: int


class Caller:
    """Calls a model in one way, with one format of cache."""

    def __init__(self, loaded: Loaded, way: Way, cache: CacheSpec, codec: Codec, vocab_size: int) -> None:
        self._loaded = loaded
        self._way = way
        self._cache = cache
        self._codec = codec
        self._vocab_size = vocab_size
        self._halves = halves(loaded.module) if way.halved else None

    def calls(self, chunks: Sequence[Chunk]) -> list[list[int]]:
        """Which chunks are computed together: short ones, the shorter padded to the longest."""
        if not self._way.batched:
            return [[index] for index in range(len(chunks))]
        calls: list[list[int]] = []
        length = padding = 0
        for index in sorted(range(len(chunks)), key=lambda index: len(chunks[index].tokens)):
            longer = len(chunks[index].tokens)
            if calls and longer < _LONG and padding + (longer - length) * len(calls[-1]) <= _PADDING:
                padding += (longer - length) * len(calls[-1])
                calls[-1].append(index)
            else:
                calls.append([index])
                padding = 0
            length = longer
        # Rows of like length stand beside each other.
        return [sorted(call, key=lambda index: chunks[index].end) for call in calls]

    def run(self, chunks: Sequence[Chunk], views: Sequence[View]) -> Outcome:
        """Compute chunks behind what their views hold, and write them into the views.

        All of it is evaluated when this returns.
        """
        rows = [Row(view, chunk.start, len(chunk.tokens)) for view, chunk in zip(views, chunks, strict=True)]
        length = max(row.count for row in rows)
        tokens = mx.array([[*chunk.tokens, *[0] * (length - len(chunk.tokens))] for chunk in chunks])
        groups = seat(alike(rows, self._codec.token_nbytes), length)
        call = Call(rows, groups, self._cache, self._codec, self._way.routed)
        wanted = [
            number * length + row
            for number, chunk in enumerate(chunks)
            for row in range(len(chunk.tokens) - chunk.num_logits, len(chunk.tokens))
        ]
        logits = self._logits(tokens, call, wanted)
        stored = tuple(mx.stack(list(parts)) for parts in zip(*call.stored, strict=True))
        held = [array for lanes in {view.lane.lanes for view in views} for array in lanes.arrays()]
        mx.eval(*([] if logits is None else [logits]), *stored, *held)
        given = np.empty((0, self._vocab_size), np.float32) if logits is None else np.array(logits)
        return Outcome(given, self._codec.to_pages(stored), call.attended)

    def _logits(self, tokens: mx.array, call: Call, wanted: list[int]) -> mx.array | None:
        """fp32 logits of the wanted ones of all rows; nothing is computed for no rows."""
        caches = call.layer_caches(self._loaded.windows)
        inner, head = self._halves or (self._loaded.module, None)
        out = inner(tokens, cache=caches)
        if not wanted:
            return None
        flat = out.reshape(-1, out.shape[-1])
        if len(wanted) < len(flat):
            flat = flat[mx.array(wanted)]
        logits = head(flat) if head is not None else flat
        return logits.astype(mx.float32)
