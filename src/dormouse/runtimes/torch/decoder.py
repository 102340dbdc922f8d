"""The decoder: one forward pass over a flat batch of rows, whatever the model family.

Every layer first writes the K and V of its rows to the arena and then attends to what the arena holds, so
each token sees the stored, rounded values of all tokens, itself included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dormouse.runtimes.decoder_config import DecoderConfig
from dormouse.runtimes.torch.kernels import RowOps
from dormouse.runtimes.torch.layers import Layer, LayerOps
from dormouse.runtimes.torch.linear import Linear
from dormouse.runtimes.torch.rope import RopeTable
from dormouse.runtimes.torch.step import Step


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
    """One forward pass: the rows of a step through a decoder, with the KV in `arena`.

    `layers` are the decoder's, each with its kernels.
    """

    def __init__(
        self, decoder: Decoder, layers: Sequence[LayerOps], step: Step, arena: Tensor, ops: RowOps
    ) -> None:
        self._decoder = decoder
        self._layers = layers
        self._step = step
        self._arena = arena
        self._ops = ops

    def run(self) -> Tensor:
        """Write the step's KV and return the wanted logits, fp32 `[wanted, vocab]`."""
        decoder, config, step, arena = self._decoder, self._decoder.config, self._step, self._arena
        x = decoder.embedding[step.token_ids].to(decoder.dtype)
        if decoder.embedding_scale != 1:
            x *= decoder.embedding_scale
        first = decoder.layers[0].input_norm
        y = self._ops.rms_norm(x, first, config.norm_eps, add_one=config.norms_less_one)
        following = [*(layer.input_norm for layer in decoder.layers[1:]), decoder.final_norm]
        batch = step.attention
        for layer, next_norm in zip(self._layers, following, strict=True):
            q = layer.project(y, step.positions, step.slots, arena)
            if next_norm is decoder.final_norm:
                batch, rows = step.logit_attention, step.logit_rows
                if not len(rows):
                    return x.new_empty((0, config.vocab_size), dtype=torch.float32)
                q, x = q[rows], x[rows]
            y = layer.complete(q, x, batch, arena, next_norm)
        return decoder.head.wide(y)
