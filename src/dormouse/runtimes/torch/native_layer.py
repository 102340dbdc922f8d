"""A decoder layer in two native calls, for layers whose linear layers are all quantized."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # public, though torch re-exports it

from dormouse import _native
from dormouse.domain.cache_spec import CacheSpec
from dormouse.runtimes.decoder_config import DecoderConfig
from dormouse.runtimes.torch.kernels import AttentionBatch
from dormouse.runtimes.torch.layers import Layer
from dormouse.runtimes.torch.native import native_layout
from dormouse.runtimes.torch.quantized_linear import QuantizedLinear
from dormouse.runtimes.torch.rope import RopeTable


class NativeLayer:
    """See `LayerOps`. The same bits as `PlainLayer` with the native kernels gives."""

    def __init__(
        self, index: int, layer: Layer, config: DecoderConfig, table: RopeTable | None, cache: CacheSpec
    ) -> None:
        linears = tuple(_parts(linear) for linear in (layer.qkv, layer.o, layer.gate_up, layer.down))
        norms = (
            layer.q_norm,
            layer.k_norm,
            layer.attention_output_norm,
            layer.mlp_norm,
            layer.mlp_output_norm,
        )
        self._heads = config.num_heads
        self._head_dim = config.head_dim
        self._width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._native = _native.DecoderLayer.make(
            native_layout(cache, index),
            linears,
            norms,
            None if table is None else table.cos,
            None if table is None else table.sin,
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            heads=config.num_heads,
            window=layer.window or 0,
            scale=config.attention_scale,
            eps=config.norm_eps,
            add_one=config.norms_less_one,
            gelu=config.activation != "silu",
        )

    @staticmethod
    def fits(layer: Layer) -> bool:
        """Whether all linear layers are quantized."""
        linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
        return all(isinstance(linear, QuantizedLinear) for linear in linears)

    def project(self, x: Tensor, positions: Tensor, slots: Tensor, arena: Tensor) -> Tensor:
        """See `LayerOps.project`."""
        qkv = torch.empty((x.shape[0], self._width), dtype=x.dtype)
        self._native.project(
            to_dlpack(x),
            to_dlpack(positions),
            to_dlpack(slots),
            to_dlpack(arena),
            to_dlpack(qkv),
            torch.get_num_threads(),
        )
        return qkv.view(x.shape[0], -1, self._head_dim)[:, : self._heads]

    def complete(
        self, q: Tensor, residual: Tensor, batch: AttentionBatch, arena: Tensor, next_norm: Tensor
    ) -> Tensor:
        """See `LayerOps.complete`."""
        out = torch.empty_like(residual)
        self._native.complete(
            to_dlpack(arena),
            to_dlpack(q),
            to_dlpack(batch.row_offsets),
            to_dlpack(batch.starts),
            to_dlpack(batch.page_table),
            to_dlpack(residual),
            to_dlpack(next_norm),
            to_dlpack(out),
            torch.get_num_threads(),
        )
        return out


def _parts(linear: object) -> tuple[object, int, object]:
    assert isinstance(linear, QuantizedLinear), linear
    return linear.packed, linear.bits, linear.bias
