"""What a decoder layer does to the rows of a step: kernel by kernel, or in two native calls.

The two give the same bits, since the native calls run the same kernels in the same order. They exist because
at one row a step is some 300 kernels of a few microseconds each, and a call from Python costs as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dormouse.runtimes.decoder_config import DecoderConfig
from dormouse.runtimes.torch.kernels import AttentionBatch, Kernels, RowOps
from dormouse.runtimes.torch.linear import Linear
from dormouse.runtimes.torch.rope import RopeTable


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer; norms as stored, in the compute dtype.

    `qkv` gives all q heads, then k, then v; `gate_up` gate, then up. The output norms are those of sandwich
    norms. `rope` is an index into `Decoder.rope_tables`.
    """

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    attention_output_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    mlp_output_norm: Tensor | None
    window: int | None
    rope: int | None


class LayerOps(Protocol):
    """One layer, bound to its weights and to the arena's layout."""

    def project(self, x: Tensor, positions: Tensor, slots: Tensor, arena: Tensor) -> Tensor:
        """Store K and V of the normed `x` `[rows, hidden]`; gives its q `[rows, heads, head_dim]`."""

    def complete(
        self, q: Tensor, residual: Tensor, batch: AttentionBatch, arena: Tensor, next_norm: Tensor
    ) -> Tensor:
        """Attention of `q` and the MLP, added to `residual` `[rows, hidden]` in place; gives its norm by
        `next_norm`."""


class PlainLayer:
    """See `LayerOps`: every kernel called from here, whatever the device and the kind of weights."""

    def __init__(
        self,
        index: int,
        layer: Layer,
        config: DecoderConfig,
        table: RopeTable | None,
        kernels: Kernels,
        ops: RowOps,
    ) -> None:
        self._index = index
        self._layer = layer
        self._config = config
        self._table = table
        self._kernels = kernels
        self._ops = ops
        self._activation = ops.silu_mul if config.activation == "silu" else ops.gelu_tanh_mul

    def project(self, x: Tensor, positions: Tensor, slots: Tensor, arena: Tensor) -> Tensor:
        """See `LayerOps.project`."""
        config, layer = self._config, self._layer
        heads, rotated = config.num_heads, config.num_heads + config.num_kv_heads
        qkv = layer.qkv(x).view(x.shape[0], -1, config.head_dim)
        qk, v = qkv[:, :rotated], qkv[:, rotated:]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = (
                self._norm_heads(qk[:, :heads], layer.q_norm),
                self._norm_heads(qk[:, heads:], layer.k_norm),
            )
            qk = torch.cat((q, k), dim=1)
        if self._table is not None:
            self._ops.rope_(qk, self._table.cos, self._table.sin, positions)
        self._kernels.write_kv(arena, self._index, qk[:, heads:], v, slots)
        return qk[:, :heads]

    def complete(
        self, q: Tensor, residual: Tensor, batch: AttentionBatch, arena: Tensor, next_norm: Tensor
    ) -> Tensor:
        """See `LayerOps.complete`."""
        layer = self._layer
        scale = self._config.attention_scale
        y = self._kernels.attend(arena, self._index, q, batch, scale, layer.window)
        y = layer.o(y.flatten(1))
        if layer.attention_output_norm is not None:
            y = self._norm(y, layer.attention_output_norm)
        y = self._add_norm(y, residual, layer.mlp_norm)
        y = layer.down(self._activation(layer.gate_up(y)))
        if layer.mlp_output_norm is not None:
            y = self._norm(y, layer.mlp_output_norm)
        return self._add_norm(y, residual, next_norm)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._ops.rms_norm(x, weight, self._config.norm_eps, add_one=self._config.norms_less_one)

    def _add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        config = self._config
        return self._ops.add_rms_norm(x, residual, weight, config.norm_eps, add_one=config.norms_less_one)

    def _norm_heads(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._norm(x.reshape(-1, x.shape[-1]), weight).view(x.shape)
