"""What is stored and what attention reads, against the torch runtime's quantizer, to the bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.runtimes.mlx.codec import Codec
from dormouse.runtimes.mlx.pages import Pages
from dormouse.runtimes.torch.quantization import dequantize, quantize

FORMATS = [KVFormat.Q8, KVFormat.K8V4, KVFormat.Q4, KVFormat.BF16, KVFormat.F32]


def spec(format: KVFormat, k_head_dim: int = 64, v_head_dim: int = 64) -> CacheSpec:
    return CacheSpec.for_heads(
        format, 16, num_layers=2, num_kv_heads=3, k_head_dim=k_head_dim, v_head_dim=v_head_dim
    )


def values(seed: int, tokens: int, width: int, magnitude: float = 1.0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    return (random.standard_normal((1, 3, tokens, width)) * magnitude).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(
    format=st.sampled_from([KVFormat.Q8, KVFormat.K8V4, KVFormat.Q4]),
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 5),
    magnitude=st.sampled_from([1e-6, 1.0, 300.0]),
    widths=st.sampled_from([(64, 64), (32, 96), (128, 64)]),
)
def test_bytes_are_those_of_torch(
    format: KVFormat, seed: int, tokens: int, magnitude: float, widths: tuple[int, int]
) -> None:
    cache = spec(format, *widths)
    inputs = [values(seed + half, tokens, width, magnitude) for half, width in enumerate(widths)]
    encoded = Codec(cache, mx.float32, packed=False).encode(*map(mx.array, inputs))
    stored = tuple(mx.stack([part, part]) for part in encoded.stored)
    halves = Codec(cache, mx.float32, packed=False).to_pages(stored)
    read = (encoded.keys[0], encoded.values[0])
    for x, half, dense, bits in zip(inputs, halves, read, format.bits, strict=True):
        packed, scales, biases = quantize(torch.from_numpy(x), bits, cache.group_size)
        np.testing.assert_array_equal(half[0][1].view(np.uint8), packed.numpy())
        np.testing.assert_array_equal(half[1][1], scales.view(torch.uint16).numpy())
        np.testing.assert_array_equal(half[2][1], biases.view(torch.uint16).numpy())
        wide = dequantize(packed, scales, biases, bits, cache.group_size)
        np.testing.assert_array_equal(np.array(dense), wide.numpy())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_no_number_stays_none_for_its_group(bad: float, packed: bool) -> None:
    cache = spec(KVFormat.Q8)
    codec = Codec(cache, mx.float32, packed=packed)
    x = values(0, 2, 64)
    x[0, 1, 0, 5] = bad
    encoded = codec.encode(mx.array(x), mx.array(x))
    halves = codec.to_pages(tuple(mx.stack([part, part]) for part in encoded.stored))
    k = tuple(part[0] for part in halves[0])
    dense = Codec(cache, mx.float32, packed=False).from_pages((k, k))[0][0]
    got = np.isnan(np.array(dense))
    assert got[0, 1, 0].all()
    assert got.sum() == 64


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("widths", [(64, 64), (32, 96)])
def test_what_was_written_is_read_back_to_the_bit(
    format: KVFormat, packed: bool, dtype: mx.Dtype, widths: tuple[int, int]
) -> None:
    """What attention sees of a token is the same whether it was just computed or comes out of a page."""
    cache = spec(format, *widths)
    codec = Codec(cache, dtype, packed=packed)
    pages = Pages(cache, 4)
    k, v = (mx.array(values(half, 21, width)).astype(dtype) for half, width in enumerate(widths))
    encoded = codec.encode(k, v)
    halves = codec.to_pages(tuple(mx.stack([part, part]) for part in encoded.stored))
    table = (2, 0)
    for start, end in ((0, 7), (7, 21)):
        rows = tuple(tuple(part[:, 0, :, start:end] for part in half) for half in halves)
        pages.write_rows(table, start, (rows[0], rows[1]))
    for layer in range(2):
        got = codec.from_pages(pages.read_rows(table, 21, layer))
        for half, expected in zip(got, (encoded.keys, encoded.values), strict=True):
            assert len(half) == (3 if packed and min(format.bits) < 16 else 1)
            for one, other in zip(half, expected, strict=True):
                assert one.dtype == other.dtype
                assert mx.array_equal(one, other)
