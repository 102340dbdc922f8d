"""The cache that one attention layer of mlx-lm's models is given, for one call of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter

import mlx.core as mx

from dormouse.domain.cache_spec import CacheSpec
from dormouse.runtimes.mlx.attention import Attention, causal_mask, mask_of
from dormouse.runtimes.mlx.codec import Codec
from dormouse.runtimes.mlx.spans import Alone, Span, Together


@dataclass(slots=True)
class Call:
    """One call of the model: its spans, in groups, and what its layers have stored so far."""

    spans: list[Span]
    groups: list[Alone | Together]
    offset: int | mx.array
    """Position of the first token of each row of the call."""

    cache: CacheSpec
    codec: Codec
    routed: bool
    """Whether attention is ours (`routing.py`); else the model attends by itself to dense arrays."""

    stored: list[tuple[mx.array, ...]] = field(default_factory=list)
    attended: int = 0

    def layer_caches(self, windows: tuple[int | None, ...]) -> list[LayerCache]:
        """One for each layer."""
        return [LayerCache(self, layer, window) for layer, window in enumerate(windows)]

    def parts(self) -> Iterator[tuple[Alone | Together, Callable[[mx.array], mx.array]]]:
        """Each group, and what takes its rows out of an array of all rows."""
        done = 0
        for group in self.groups:
            rows = slice(done, done + group.num_rows)
            yield group, itemgetter(rows) if len(self.groups) > 1 else _whole
            done += group.num_rows


def _whole(array: mx.array) -> mx.array:
    return array


class CausalMask(str):
    """A mask that is not made yet: our attention makes what each row needs of it."""

    window: int | None

    def __new__(cls, window: int | None) -> CausalMask:
        mask = super().__new__(cls, "causal")
        mask.window = window
        return mask


class LayerCache:
    """The methods that mlx-lm's models call on their caches, and `offset`, where the next tokens go."""

    def __init__(self, call: Call, layer: int, window: int | None) -> None:
        self._call = call
        self._layer = layer
        self._window = window
        self.offset = call.offset

    @property
    def is_routed(self) -> bool:
        """Whether attention is `attend`."""
        return self._call.routed

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Round and store `[rows, kv_heads, tokens, head_dim]`; what the model attends to by itself."""
        call = self._call
        new = call.codec.encode(keys, values)
        call.stored.append(new.stored)
        # Computing goes on while Python describes the layers that follow.
        mx.async_eval(new.stored)  # type: ignore[no-untyped-call]
        for group, part in call.parts():
            own = [tuple(part(array) for array in half) for half in (new.keys, new.values)]
            group.write(self._layer, own[0], own[1])
        self.offset = self.offset + keys.shape[2]
        if call.routed:
            return keys, values
        (span,) = call.spans
        (all_keys,), (all_values,) = span.view.lane.read(self._layer, 0, span.end)
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
        (span,) = self._call.spans
        return causal_mask(N, span.end, window) if return_array else mask_of(N, span.end, window)

    def attend(
        self,
        queries: mx.array,
        scale: float,
        mask: object,
        sinks: mx.array | None,
    ) -> mx.array:
        """Each sequence over its own view; queries and result are `[rows, heads, tokens, ...]`.

        Raises TypeError for a mask that is not from `make_mask`: a model that adds to it needs it whole.
        """
        if not isinstance(mask, CausalMask):
            raise TypeError(f"the model attends with a mask of its own, {type(mask).__name__}")
        call = self._call
        call.attended += 1
        window = _narrower(self._window, mask.window)
        attention = Attention(call.cache, call.codec.packed, scale, sinks)
        outs = [group.attend(self._layer, part(queries), window, attention) for group, part in call.parts()]
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)


def _narrower(window: int | None, other: int | None) -> int | None:
    return other if window is None else window if other is None else min(window, other)
