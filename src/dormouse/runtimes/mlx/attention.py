"""Attention over a view, dense or quantized."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from dormouse.domain.cache_spec import CacheSpec
from dormouse.runtimes.mlx.codec import Arrays

Mask = mx.array | str | None
"""What tokens may see: bool, broadcast to `[rows, heads, tokens, all]`; `"causal"`; None: everything."""


@dataclass(frozen=True, slots=True)
class Attention:
    """What is the same for all rows of a call. Raises TypeError for sinks over quantized arrays."""

    cache: CacheSpec
    packed: bool
    scale: float
    sinks: mx.array | None

    def __call__(self, queries: mx.array, keys: Arrays, values: Arrays, mask: Mask) -> mx.array:
        """Queries `[rows, heads, tokens, k_head_dim]` over K and V, `[rows, kv_heads, all, ...]`."""
        if not self.packed:
            return attend_dense(queries, keys[0], values[0], self.scale, mask, self.sinks)
        if self.sinks is not None:
            raise TypeError("attention sinks over quantized arrays")
        return attend_packed(queries, keys, values, self.scale, mask, self.cache)


def attend_dense(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: Mask = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Arrays of K and V as they are."""
    rows, heads, count, width = queries.shape
    if sinks is not None or isinstance(mask, str):
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )
    # The heads of a group as rows of one product: K and V are read once, not once per head.
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    grouped = queries.reshape(rows, kv_heads, group * count, width)
    if mask is not None and count > 1:
        mask = mx.tile(mask, (1, 1, group, 1))
    out = mx.fast.scaled_dot_product_attention(grouped, keys, values, scale=scale, mask=mask)
    return out.reshape(rows, heads, count, values.shape[-1])


def attend_packed(
    queries: mx.array, keys: Arrays, values: Arrays, scale: float, mask: Mask, cache: CacheSpec
) -> mx.array:
    """Data, scales and biases of both."""
    rows, heads, count, width = queries.shape
    kv_heads = keys[0].shape[1]
    k_bits, v_bits = cache.format.bits
    # All heads of a group are rows of one product over the KV head that they share.
    grouped = (queries * scale).reshape(rows, kv_heads, heads // kv_heads * count, width)
    scores = _product(grouped, keys, True, cache.group_size, k_bits)
    if mask is not None:
        length = scores.shape[-1]
        visible = causal_mask(count, length, None) if isinstance(mask, str) else mask
        split = scores.reshape(rows, kv_heads, heads // kv_heads, count, length)
        split = mx.where(visible[..., None, :, :], split, mx.finfo(scores.dtype).min)
        scores = split.reshape(scores.shape)
    weights = mx.softmax(scores, axis=-1, precise=True)
    out = _product(weights, values, False, cache.group_size, v_bits)
    return out.reshape(rows, heads, count, -1)


def _product(rows: mx.array, packed: Arrays, transpose: bool, group_size: int, bits: int) -> mx.array:
    data, scales, biases = packed
    return mx.quantized_matmul(
        rows, data, scales, biases, transpose=transpose, group_size=group_size, bits=bits
    )


def mask_of(count: int, length: int, window: int | None) -> Mask:
    """What the last `count` of `length` tokens may see, in the cheapest form that MLX takes."""
    if count == 1 and (window is None or length <= window):
        return None
    if window is None or length <= window:
        return "causal"
    return causal_mask(count, length, window)


def causal_mask(count: int, length: int, window: int | None) -> mx.array:
    """bool `[count, length]`: a token sees itself and those before it, `window` in all."""
    return _seen(mx.arange(length - count, length), mx.arange(length), window)


def rows_mask(own: mx.array, first: int, end: int, window: int | None) -> mx.array:
    """bool `[rows, 1, tokens, end - first]`: the same for tokens at the positions `own`, `[rows, tokens]`,
    over the positions from `first` to `end`."""
    return _seen(own[:, None], mx.arange(first, end), window)


def _seen(own: mx.array, others: mx.array, window: int | None) -> mx.array:
    own = own[..., None]
    mask = own >= others
    return mask if window is None else mask & (own < others + window)
