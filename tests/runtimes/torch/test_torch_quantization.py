"""Quantization to the bit, against the same arithmetic written in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dormouse.runtimes.torch.quantization import dequantize, quantize

Array = NDArray[np.float32]


def bf16(x: Array) -> Array:
    """Round to bf16, half to even."""
    bits = x.view(np.uint32)
    even = bits + 0x7FFF + ((bits >> 16) & 1)
    rounded: Array = (even & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return rounded


def oracle(x: Array, bits: int, group_size: int) -> tuple[NDArray[np.uint32], Array, Array]:
    groups = x.reshape(*x.shape[:-1], -1, group_size)
    low, high = groups.min(-1), groups.max(-1)
    biases, scales = bf16(low), bf16((high - low) / np.float32(2**bits - 1))
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    values = np.clip(np.rint((groups - biases[..., None]) * inverse[..., None]), 0, 2**bits - 1)
    per_word = 32 // bits
    words = values.astype(np.uint32).reshape(*x.shape[:-1], -1, per_word)
    packed = (words << (np.arange(per_word, dtype=np.uint32) * bits)).sum(-1, dtype=np.uint32)
    return packed, scales, biases


@pytest.mark.parametrize("bits", [4, 8])
@given(
    rows=st.integers(1, 7),
    heads=st.integers(1, 3),
    num_groups=st.integers(1, 4),
    group_size=st.sampled_from([32, 64]),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 300.0]),
    offset=st.sampled_from([0.0, -5.0, 1000.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_it_equals_the_oracle_bit_for_bit(
    bits: int,
    rows: int,
    heads: int,
    num_groups: int,
    group_size: int,
    magnitude: float,
    offset: float,
    seed: int,
) -> None:
    normal = np.random.default_rng(seed).standard_normal((rows, heads, num_groups * group_size))
    x = (normal * magnitude + offset).astype(np.float32)
    packed, scales, biases = quantize(torch.from_numpy(x), bits, group_size)
    wanted_packed, wanted_scales, wanted_biases = oracle(x, bits, group_size)
    np.testing.assert_array_equal(packed.numpy().view(np.uint32), wanted_packed)
    np.testing.assert_array_equal(scales.float().numpy(), wanted_scales)
    np.testing.assert_array_equal(biases.float().numpy(), wanted_biases)
    back = dequantize(packed, scales, biases, bits, group_size).numpy()
    step = np.repeat(wanted_scales, group_size, axis=-1)
    # Half a step, what rounding the bias moved, and what a scale rounded down cannot reach.
    slack = np.abs(np.repeat(wanted_biases, group_size, axis=-1)) / 128 + step * 2**bits / 256
    assert (np.abs(back - x) <= 0.51 * step + slack).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_strided_input_and_bf16_are_taken_as_they_are(bits: int) -> None:
    wide = torch.randn(5, 7, 128).bfloat16()
    strided = wide[:, 2:5]
    for given_, wanted in zip(
        quantize(strided, bits, 64), quantize(strided.clone().float(), bits, 64), strict=True
    ):
        assert torch.equal(given_, wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_constant_group_comes_back_as_its_bias(bits: int) -> None:
    x = torch.full((2, 64), 0.7)
    assert torch.equal(dequantize(*quantize(x, bits, 64), bits, 64), x.bfloat16().float())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible_in_its_group_alone(bits: int, bad: float) -> None:
    x = torch.randn(1, 128)
    x[0, 3] = bad
    back = dequantize(*quantize(x, bits, 64), bits, 64)
    assert not back[0, :64].isfinite().any()
    assert back[0, 64:].isfinite().all()
