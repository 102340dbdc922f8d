"""The kernels of `native/`: Python normalizes and allocates, C++ only computes.

Rows may be strided (a slice of a fused projection); what lies within a row must be contiguous and is made so
here. Wrong shapes raise ValueError, wrong dtypes TypeError. Tensors cross as `to_dlpack` capsules, which cost
0.4 us each; the `__dlpack__` that nanobind would call costs 4 us, more than a small kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # public, though torch re-exports it

# After torch: the module then binds to the libgomp that torch has loaded, and shares its threads.
from dormouse import _native
from dormouse.domain.cache_spec import CacheSpec, Half
from dormouse.runtimes.torch.kernels import AttentionBatch

HEAD_ALIGNMENT = 16
MAX_HEAD_DIM = 512


def isa() -> str:
    """The instruction set in use: `avx512bf16`, `avx512`, `avx2` or `portable`."""
    return _native.isa()


class NativeKernels:
    """See `Kernels`. Row invariant to the bit, for any number of threads."""

    def __init__(self, cache: CacheSpec) -> None:
        self._cache = cache
        self._layers = tuple(native_layout(cache, index) for index in range(len(cache.layers)))

    def write_kv(self, arena: Tensor, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """See `Kernels.write_kv`. No two rows may share a slot."""
        k, v = _rows(k), _rows(v)
        _native.write_kv(
            to_dlpack(arena),
            self._layers[layer],
            to_dlpack(k),
            to_dlpack(v),
            to_dlpack(slots),
            torch.get_num_threads(),
        )

    def attend(
        self, arena: Tensor, layer: int, q: Tensor, batch: AttentionBatch, scale: float, window: int | None
    ) -> Tensor:
        """See `Kernels.attend`."""
        q = _rows(q)
        out = torch.empty((*q.shape[:2], self._cache.v_head_dim), dtype=q.dtype)
        _native.attend(
            to_dlpack(arena),
            self._layers[layer],
            to_dlpack(q),
            to_dlpack(out),
            to_dlpack(batch.row_offsets),
            to_dlpack(batch.starts),
            to_dlpack(batch.page_table),
            scale,
            window or 0,
            torch.get_num_threads(),
        )
        return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, add_one: bool = False) -> Tensor:
    """Root mean square norm of `[rows, dim]`; `add_one` where weights are stored less one."""
    return _norm(x, None, weight, eps, add_one)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, add_one: bool = False) -> Tensor:
    """Add `x` to `residual` in place and return the norm of the sum, rounded to the dtype before."""
    return _norm(x, residual, weight, eps, add_one)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """Rotate `[rows, heads, dim]` in place by halves: dimension i with i + `cos.shape[1]`.

    `cos` and `sin` are float32 `[positions, rotated / 2]`; dimensions that they do not cover stay.
    """
    _native.rope(to_dlpack(x), to_dlpack(cos), to_dlpack(sin), to_dlpack(positions), torch.get_num_threads())


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[rows, 2 * ffn]`, gate first."""
    return _gate(gate_up, gelu=False)


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """`gelu(gate) * up` of `[rows, 2 * ffn]`, gate first, in the tanh approximation."""
    return _gate(gate_up, gelu=True)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, add_one: bool) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    added = None if residual is None else to_dlpack(residual)
    _native.norm(
        to_dlpack(x), added, to_dlpack(weight), to_dlpack(out), eps, add_one, torch.get_num_threads()
    )
    return out


def _gate(gate_up: Tensor, *, gelu: bool) -> Tensor:
    gate_up = gate_up.contiguous()
    out = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=gate_up.dtype)
    _native.gate(to_dlpack(gate_up), to_dlpack(out), gelu, torch.get_num_threads())
    return out


def _rows(x: Tensor) -> Tensor:
    """`x` itself when each of its rows is contiguous and rows do not overlap, else a copy."""
    if x.is_contiguous():
        return x
    if x.dim() == 3 and x.stride()[1:] == (x.shape[2], 1) and x.stride(0) >= x.shape[1] * x.shape[2]:
        return x
    return x.contiguous()


def native_layout(cache: CacheSpec, layer: int) -> _native.Layer:
    """Where the K and V of `layer` lie in a page."""
    k, v = cache.layers[layer]
    return _native.Layer.make(
        _offsets(k),
        _offsets(v),
        kv_heads=cache.num_kv_heads,
        block_size=cache.block_size,
        group_size=cache.group_size,
        block_nbytes=cache.block_nbytes,
    )


def _offsets(half: Half) -> tuple[int, int, int, int, int]:
    scales = half.scales.offset if half.scales else 0
    biases = half.biases.offset if half.biases else 0
    return half.bits, half.head_dim, half.data.offset, scales, biases
