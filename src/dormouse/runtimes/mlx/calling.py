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
from dormouse.runtimes.mlx.spans import Span, alike, seat
from dormouse.runtimes.mlx.view import View

_LONG = 16
"""Tokens from which on a chunk is a call of its own."""


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
    """`logits` are fp32 `[wanted, vocab_size]` in the order of the chunks; of each chunk, parts of K and V as
    pages take them, `[layers, kv_heads, tokens, ...]`."""

    logits: Logits
    stored: list[tuple[Parts, Parts]]
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
        """Which chunks are computed together: all short ones, like length beside like length."""
        if not self._way.batched:
            return [[index] for index in range(len(chunks))]
        short = [index for index, chunk in enumerate(chunks) if len(chunk.tokens) < _LONG]
        long = [[index] for index, chunk in enumerate(chunks) if len(chunk.tokens) >= _LONG]
        return [sorted(short, key=lambda index: chunks[index].end), *long] if short else long

    def run(self, chunks: Sequence[Chunk], views: Sequence[View]) -> Outcome:
        """Compute chunks behind what their views hold, and write them into the views.

        One chunk is one row of the model's input. Of several each token is a row, with its own position, so
        that chunks of any lengths cost no padding. All of it is evaluated when this returns.
        """
        spans = [
            Span(view, chunk.start, len(chunk.tokens)) for view, chunk in zip(views, chunks, strict=True)
        ]
        spread = len(spans) > 1
        inputs = mx.array([token for chunk in chunks for token in chunk.tokens])[None]
        offset: int | mx.array = spans[0].start
        if spread:
            inputs = inputs.T
            offset = mx.array([position for span in spans for position in range(span.start, span.end)])
        groups = seat(alike(spans, self._codec.token_nbytes), spread)
        call = Call(spans, groups, offset, self._cache, self._codec, self._way.routed)
        ends = np.cumsum([span.count for span in spans]).tolist()
        wanted = [
            number
            for chunk, end in zip(chunks, ends, strict=True)
            for number in range(end - chunk.num_logits, end)
        ]
        logits = self._logits(inputs, call, wanted)
        stored = tuple(mx.stack(list(parts)) for parts in zip(*call.stored, strict=True))
        held = [array for lanes in {view.lane.lanes for view in views} for array in lanes.arrays()]
        mx.eval(*([] if logits is None else [logits]), *stored, *held)
        given = np.empty((0, self._vocab_size), np.float32) if logits is None else np.array(logits)
        return Outcome(given, _by_chunk(self._codec.to_pages(stored), ends), call.attended)

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


def _by_chunk(halves: tuple[Parts, Parts], ends: list[int]) -> list[tuple[Parts, Parts]]:
    """Parts `[layers, rows, kv_heads, tokens, ...]` of a call, chunk by chunk; `ends` count its tokens."""
    if len(ends) == 1:
        return [(tuple(part[:, 0] for part in halves[0]), tuple(part[:, 0] for part in halves[1]))]
    by_token = [tuple(part[:, :, :, 0].swapaxes(1, 2) for part in half) for half in halves]
    starts = [0, *ends[:-1]]
    return [
        (
            tuple(part[:, :, start:end] for part in by_token[0]),
            tuple(part[:, :, start:end] for part in by_token[1]),
        )
        for start, end in zip(starts, ends, strict=True)
    ]
