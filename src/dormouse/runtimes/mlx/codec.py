"""From K and V as a model computes them to what is stored and what attention reads, and back from pages.

The rule of rounding is that of `runtimes/torch/quantization.py`, to the bit. MLX's own `quantize` has another
one: it rounds its scale to bf16 after it has divided by it, which costs half a step at 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from dormouse.domain.cache_spec import CacheSpec
from dormouse.runtimes.mlx.pages import Array, Parts

Arrays = tuple[mx.array, ...]
"""K or V as attention reads it: dense, or data, scales and biases. Each `[rows, kv_heads, tokens, ...]`."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """New K and V: what goes into pages, and what attention reads.

    `stored` is K above V along the heads where their heads are of one size, else K's parts, then V's.
    """

    stored: Arrays
    keys: Arrays
    values: Arrays


class Codec:
    """The format of a cache in one dtype of computing. `packed`: attention reads quantized arrays."""

    def __init__(self, cache: CacheSpec, dtype: mx.Dtype, packed: bool) -> None:
        self._cache = cache
        self._dtype = dtype
        self._bits = cache.format.bits
        self._quantized = min(self._bits) < 16
        self._packed = packed and self._quantized
        self._joined = cache.k_head_dim == cache.v_head_dim
        heads = cache.num_kv_heads
        levels = np.repeat(np.array([2**bits - 1 for bits in self._bits], np.float32), heads)
        self._levels = mx.array(levels.reshape(1, 2 * heads, 1, 1, 1))

    @property
    def packed(self) -> bool:
        """Whether keys and values are data, scales and biases."""
        return self._packed

    @property
    def token_nbytes(self) -> int:
        """About how many bytes attention reads for a token of one layer."""
        width = self._cache.num_kv_heads * (self._cache.k_head_dim + self._cache.v_head_dim)
        return width * (1 if self._packed else self._dtype.size)

    def encode(self, keys: mx.array, values: mx.array) -> Encoded:
        """Round `[rows, kv_heads, tokens, head_dim]` of any float dtype."""
        heads = self._cache.num_kv_heads
        if self._joined:
            stored, dense = self._round(mx.concatenate([keys, values], axis=1), self._levels)
            k_parts = tuple(part[:, :heads] for part in stored)
            v_parts = tuple(part[:, heads:] for part in stored)
            dense_k, dense_v = dense[:, :heads], dense[:, heads:]
        else:
            k_parts, dense_k = self._round(keys, self._levels[:, :heads])
            v_parts, dense_v = self._round(values, self._levels[:, heads:])
            stored = (*k_parts, *v_parts)
        if not self._packed:
            return Encoded(stored, (dense_k,), (dense_v,))
        k_bits, v_bits = self._bits
        return Encoded(stored, self._pack(k_parts, k_bits), self._pack(v_parts, v_bits))

    def to_pages(self, stored: Arrays) -> tuple[Parts, Parts]:
        """What `Encoded.stored` is in pages: evaluated arrays `[layers, rows, heads, tokens, ...]`."""
        parts = [_raw(part) for part in stored]
        heads = self._cache.num_kv_heads
        if self._joined:
            k, v = [part[:, :, :heads] for part in parts], [part[:, :, heads:] for part in parts]
        else:
            k, v = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        if self._quantized:
            k[0], v[0] = (_pack(half[0], bits) for half, bits in zip((k, v), self._bits, strict=True))
        return tuple(k), tuple(v)

    def from_pages(self, halves: tuple[Parts, Parts]) -> tuple[Arrays, Arrays]:
        """What attention reads of parts as `Pages.read_rows` gives them."""
        k, v = (self._read(half, bits) for half, bits in zip(halves, self._bits, strict=True))
        return k, v

    def _read(self, half: Parts, bits: int) -> Arrays:
        if not self._quantized:
            data = mx.array(half[0])
            return ((data.view(mx.bfloat16) if bits == 16 else data).astype(self._dtype),)
        data, scales, biases = mx.array(half[0]), *(mx.array(part).view(mx.bfloat16) for part in half[1:])
        if self._packed:
            return data, scales.astype(self._dtype), biases.astype(self._dtype)
        wide = mx.dequantize(
            data,
            scales.astype(mx.float32),
            biases.astype(mx.float32),
            group_size=self._cache.group_size,
            bits=bits,
        )
        return (wide.astype(self._dtype),)

    def _round(self, x: mx.array, levels: mx.array) -> tuple[Arrays, mx.array]:
        """What is stored of `x`, and the values that it stands for, in the dtype of computing."""
        if not self._quantized:
            stored = x.astype(mx.bfloat16 if self._bits[0] == 16 else mx.float32)
            return (stored,), stored.astype(self._dtype)
        groups = x.astype(mx.float32).reshape(*x.shape[:-1], -1, self._cache.group_size)
        low = groups.min(axis=-1, keepdims=True)
        biases = low.astype(mx.bfloat16)
        scales = ((groups.max(axis=-1, keepdims=True) - low) / levels).astype(mx.bfloat16)
        scale, bias = scales.astype(mx.float32), biases.astype(mx.float32)
        inverse = mx.where(scale > 0, 1 / scale, 0.0)
        whole = mx.clip(mx.round((groups - bias) * inverse), 0, levels)
        dense = (whole * scale + bias).reshape(x.shape).astype(self._dtype)
        return (whole.reshape(x.shape), scales.squeeze(-1), biases.squeeze(-1)), dense

    def _pack(self, parts: Arrays, bits: int) -> Arrays:
        whole, scales, biases = parts
        per_byte = mx.where(mx.isnan(whole), 0, whole).astype(mx.uint8)
        if bits == 4:
            per_byte = per_byte[..., 0::2] | (per_byte[..., 1::2] << 4)
        data = mx.contiguous(per_byte).view(mx.uint32)
        return data, scales.astype(self._dtype), biases.astype(self._dtype)


def _raw(array: mx.array) -> Array:
    """An evaluated array as NumPy's, without a copy; bf16 as uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def _pack(whole: Array, bits: int) -> Array:
    """Whole numbers in fp32 `[..., head_dim]` as packed words `[..., head_dim * bits / 32]`."""
    per_byte: Array = np.nan_to_num(whole, nan=0.0).astype(np.uint8)
    if bits == 4:
        per_byte = per_byte[..., 0::2] | (per_byte[..., 1::2] << 4)
    return np.ascontiguousarray(per_byte).view(np.uint32)
