"""Attention of one sequence over its view, dense or quantized."""

from __future__ import annotations

import mlx.core as mx

from dormouse.domain.cache_spec import CacheSpec
from dormouse.runtimes.mlx.codec import Arrays


def attend_dense(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    window: int | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """The last tokens `[1, heads, tokens, k_head_dim]` attend to all keys up to their own.

    `keys` and `values` are `[1, kv_heads, all, ...]`, nothing before the first token's window.
    """
    _, heads, count, width = queries.shape
    kv_heads = keys.shape[1]
    if count == 1 and sinks is None:
        # The heads of a group as rows of one product: K and V are read once, not once per head.
        grouped = queries.reshape(1, kv_heads, heads // kv_heads, width)
        out = mx.fast.scaled_dot_product_attention(grouped, keys, values, scale=scale)
        return out.reshape(1, heads, 1, values.shape[-1])
    mask = mask_of(count, keys.shape[2], window)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def attend_packed(
    queries: mx.array, keys: Arrays, values: Arrays, scale: float, window: int | None, cache: CacheSpec
) -> mx.array:
    """As `attend_dense`, over data, scales and biases of both."""
    _, heads, count, width = queries.shape
    kv_heads = keys[0].shape[1]
    k_bits, v_bits = cache.format.bits
    # All heads of a group are rows of one product over the KV head that they share.
    rows = (queries * scale).reshape(1, kv_heads, heads // kv_heads * count, width)
    scores = mx.quantized_matmul(rows, *keys, transpose=True, group_size=cache.group_size, bits=k_bits)
    mask = mask_of(count, keys[0].shape[2], window)
    if mask is not None:
        scores = scores.reshape(1, kv_heads, heads // kv_heads, count, -1)
        visible = causal_mask(count, scores.shape[-1], window) if isinstance(mask, str) else mask
        scores = mx.where(visible, scores, mx.finfo(scores.dtype).min)
        scores = scores.reshape(1, kv_heads, heads // kv_heads * count, -1)
    weights = mx.softmax(scores, axis=-1, precise=True)
    out = mx.quantized_matmul(weights, *values, transpose=False, group_size=cache.group_size, bits=v_bits)
    return out.reshape(1, heads, count, -1)


def mask_of(count: int, length: int, window: int | None) -> mx.array | str | None:
    """What the last `count` of `length` tokens may see, in the cheapest form that MLX takes."""
    if count == 1 and (window is None or length <= window):
        return None
    if window is None or length <= window:
        return "causal"
    return causal_mask(count, length, window)


def causal_mask(count: int, length: int, window: int | None) -> mx.array:
    """bool `[count, length]`: a token sees itself and those before it, `window` in all."""
    own = mx.arange(length - count, length)[:, None]
    seen = mx.arange(length)[None]
    mask = own >= seen
    return mask if window is None else mask & (own < seen + window)
