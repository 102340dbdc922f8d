"""Attention against NumPy: groups of heads, windows, quantized arrays."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.runtimes.mlx.mlx_toys import close_to

from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.runtimes.mlx.attention import attend_dense, attend_packed, mask_of
from dormouse.runtimes.mlx.codec import Codec

Array = NDArray[np.float32]


def oracle(q: Array, k: Array, v: Array, scale: float, window: int | None) -> Array:
    heads, count, length = q.shape[1], q.shape[2], k.shape[2]
    k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    scores = scale * q @ k.transpose(0, 1, 3, 2)
    own, seen = np.arange(length - count, length)[:, None], np.arange(length)[None]
    visible = (own >= seen) & (own < seen + (window or length + 1))
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: Array = weights / weights.sum(-1, keepdims=True) @ v
    return out


@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 40), (5, 40), (40, 40), (3, 9)])
@pytest.mark.parametrize("window", [None, 4, 40])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_it_equals_numpy(
    count: int, length: int, window: int | None, heads: tuple[int, int], packed: bool
) -> None:
    if window is not None and count == 1:
        length = min(length, window)  # what is before the first token's window is not handed over
    random = np.random.default_rng(count + length)
    q = random.standard_normal((1, heads[0], count, 64)).astype(np.float32)
    k = random.standard_normal((1, heads[1], length, 64)).astype(np.float32)
    v = random.standard_normal((1, heads[1], length, 32)).astype(np.float32)
    cache = CacheSpec.for_heads(
        KVFormat.K8V4, 16, num_layers=1, num_kv_heads=heads[1], k_head_dim=64, v_head_dim=32
    )
    dense = Codec(cache, mx.float32, packed=False).encode(mx.array(k), mx.array(v))
    expected = oracle(q, np.array(dense.keys[0]), np.array(dense.values[0]), 0.2, window)
    mask = mask_of(count, length, window)
    if packed:
        arrays = Codec(cache, mx.float32, packed=True).encode(mx.array(k), mx.array(v))
        out = attend_packed(mx.array(q), arrays.keys, arrays.values, 0.2, mask, cache)
    else:
        out = attend_dense(mx.array(q), dense.keys[0], dense.values[0], 0.2, mask)
    close_to(np.array(out), expected, 1e-5)
