"""The decoder: one forward pass over a flat batch of rows, whatever the model family.

Every layer first writes the K and V of its rows to the arena and then attends to what the arena holds, so
each token sees the stored, rounded values of all tokens, itself included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dormouse.runtimes.torch.config import DecoderConfig
from dormouse.runtimes.torch.kernels import AttentionBatch, Kernels, RowOps
from dormouse.runtimes.torch.linear import Linear
from dormouse.runtimes.torch.rope import RopeTable
from dormouse.runtimes.torch.step import Step


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


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model's weights. `embedding` is `[vocab, hidden]` in the dtype of the file, or of the computation."""

    config: DecoderConfig
    dtype: torch.dtype
    embedding: Tensor
    embedding_scale: float
    layers: tuple[Layer, ...]
    final_norm: Tensor
    head: Linear
    rope_tables: tuple[RopeTable, ...]


class Pass:
    """One forward pass: the rows of a step through a decoder, with the KV in `arena`."""

    def __init__(self, decoder: Decoder, step: Step, arena: Tensor, kernels: Kernels, ops: RowOps) -> None:
        self._decoder = decoder
        self._config = decoder.config
        self._step = step
        self._arena = arena
        self._kernels = kernels
        self._ops = ops
        self._activation = ops.silu_mul if decoder.config.activation == "silu" else ops.gelu_tanh_mul

    def run(self) -> Tensor:
        """Write the step's KV and return the wanted logits, fp32 `[wanted, vocab]`."""
        decoder = self._decoder
        x = decoder.embedding[self._step.token_ids].to(decoder.dtype)
        if decoder.embedding_scale != 1:
            x *= decoder.embedding_scale
        y = self._norm(x, decoder.layers[0].input_norm)
        following = [*(layer.input_norm for layer in decoder.layers[1:]), decoder.final_norm]
        batch = self._step.attention
        for index, (layer, next_norm) in enumerate(zip(decoder.layers, following, strict=True)):
            q = self._write_kv(index, layer, y)
            if next_norm is decoder.final_norm:
                batch, rows = self._step.logit_attention, self._step.logit_rows
                if not len(rows):
                    return x.new_empty((0, self._config.vocab_size), dtype=torch.float32)
                q, x = q[rows], x[rows]
            y = self._attention(index, layer, q, batch)
            if layer.attention_output_norm is not None:
                y = self._norm(y, layer.attention_output_norm)
            y = self._add_norm(y, x, layer.mlp_norm)
            y = layer.down(self._activation(layer.gate_up(y)))
            if layer.mlp_output_norm is not None:
                y = self._norm(y, layer.mlp_output_norm)
            y = self._add_norm(y, x, next_norm)
        return decoder.head(y).float()

    def _write_kv(self, index: int, layer: Layer, x: Tensor) -> Tensor:
        """Store K and V of `x` `[rows, hidden]`; gives its q `[rows, heads, head_dim]`."""
        config, step = self._config, self._step
        heads, rotated = config.num_heads, config.num_heads + config.num_kv_heads
        qkv = layer.qkv(x).view(x.shape[0], -1, config.head_dim)
        qk, v = qkv[:, :rotated], qkv[:, rotated:]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = (
                self._norm_heads(qk[:, :heads], layer.q_norm),
                self._norm_heads(qk[:, heads:], layer.k_norm),
            )
            qk = torch.cat((q, k), dim=1)
        if layer.rope is not None:
            table = self._decoder.rope_tables[layer.rope]
            self._ops.rope_(qk, table.cos, table.sin, step.positions)
        self._kernels.write_kv(self._arena, index, qk[:, heads:], v, step.slots)
        return qk[:, :heads]

    def _attention(self, index: int, layer: Layer, q: Tensor, batch: AttentionBatch) -> Tensor:
        """What the rows of `batch` make of their past, `[rows, hidden]`."""
        scale = self._config.attention_scale
        y = self._kernels.attend(self._arena, index, q, batch, scale, layer.window)
        return layer.o(y.flatten(1))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._ops.rms_norm(x, weight, self._config.norm_eps, add_one=self._config.norms_less_one)

    def _add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        config = self._config
        return self._ops.add_rms_norm(x, residual, weight, config.norm_eps, add_one=config.norms_less_one)

    def _norm_heads(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._norm(x.reshape(-1, x.shape[-1]), weight).view(x.shape)
