"""The cache that one attention layer of mlx-lm's models is given, for one call of the model."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from dormouse.domain.cache_spec import CacheSpec
from dormouse.runtimes.mlx.attention import attend_dense, attend_packed, causal_mask, mask_of
from dormouse.runtimes.mlx.codec import Codec
from dormouse.runtimes.mlx.view import View


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


@dataclass(slots=True)
class Call:
    """One call of the model: its rows, and what its layers have stored so far."""

    rows: list[Row]
    cache: CacheSpec
    codec: Codec
    routed: bool
    """Whether attention is ours (`routing.py`); else the model attends by itself to dense arrays."""

    stored: list[tuple[mx.array, ...]] = field(default_factory=list)
    attended: int = 0

    def layer_caches(self, windows: tuple[int | None, ...]) -> list[LayerCache]:
        """One for each layer."""
        return [LayerCache(self, layer, window) for layer, window in enumerate(windows)]


class CausalMask(str):
    """A mask that is not made yet: our attention makes what each row needs of it."""

    window: int | None

    def __new__(cls, window: int | None) -> CausalMask:
        mask = super().__new__(cls, "causal")
        mask.window = window
        return mask


class LayerCache:
    """The methods that mlx-lm's models call on their caches.

    `offset` is the position of the call's first token: an int, or one for each row.
    """

    def __init__(self, call: Call, layer: int, window: int | None) -> None:
        self._call = call
        self._layer = layer
        self._window = window
        rows = call.rows
        self.offset: int | mx.array = rows[0].start
        if len(rows) > 1:
            self.offset = mx.array([row.start for row in rows])

    @property
    def is_routed(self) -> bool:
        """Whether attention is `attend`."""
        return self._call.routed

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Round and store `[rows, kv_heads, tokens, head_dim]`; what the model attends to by itself."""
        call = self._call
        new = call.codec.encode(keys, values)
        call.stored.append(new.stored)
        for index, row in enumerate(call.rows):
            part = (slice(index, index + 1), slice(None), slice(row.count))
            own_keys = tuple(array[part] for array in new.keys)
            own_values = tuple(array[part] for array in new.values)
            row.view.write(self._layer, row.start, own_keys, own_values)
        self.offset = self.offset + keys.shape[2]
        if call.routed:
            return keys, values
        (row,) = call.rows
        (all_keys,), (all_values,) = row.view.read(self._layer, 0, row.end)
        return all_keys, all_values

    def make_mask(
        self,
        N: int,  # noqa: N803  (as mlx-lm calls it)
        return_array: bool = False,
        window_size: int | None = None,
    ) -> CausalMask | mx.array | str | None:
        """What the call's tokens may see; called before they are stored."""
        window = _narrower(self._window, window_size)
        if self._call.routed:
            return CausalMask(window)
        (row,) = self._call.rows
        return causal_mask(N, row.end, window) if return_array else mask_of(N, row.end, window)

    def attend(
        self,
        queries: mx.array,
        scale: float,
        mask: object,
        sinks: mx.array | None,
    ) -> mx.array:
        """Each row over its own view; queries and result are `[rows, heads, tokens, ...]`.

        Raises TypeError for a mask that is not from `make_mask`: a model that adds to it needs it whole.
        """
        if not isinstance(mask, CausalMask):
            raise TypeError(f"the model attends with a mask of its own, {type(mask).__name__}")
        self._call.attended += 1
        window = _narrower(self._window, mask.window)
        outs = [self._attend(index, queries, scale, window, sinks) for index in range(len(self._call.rows))]
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)

    def _attend(
        self, index: int, queries: mx.array, scale: float, window: int | None, sinks: mx.array | None
    ) -> mx.array:
        row, cache = self._call.rows[index], self._call.cache
        own = queries[index : index + 1, :, : row.count]
        first = 0 if window is None else max(0, row.start - window + 1)
        keys, values = row.view.read(self._layer, first, row.end)
        if self._call.codec.packed:
            if sinks is not None:
                raise TypeError("attention sinks over quantized arrays")
            out = attend_packed(own, keys, values, scale, window, cache)
        else:
            out = attend_dense(own, keys[0], values[0], scale, window, sinks)
        missing = queries.shape[2] - row.count
        return mx.pad(out, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else out


def _narrower(window: int | None, other: int | None) -> int | None:
    return other if window is None else window if other is None else min(window, other)
