"""Affine quantization of K and V, exact to the bit so that native kernels can match it.

Per token, head and group of `group_size` values along the head, all in fp32: `bias = bf16(min)`,
`scale = bf16((max - min) / (2**bits - 1))`, `q = clamp(rint((x - bias) * (1 / scale)), 0, 2**bits - 1)`, and
q = 0 where scale is 0. Rounding is half to even. Values are packed little-endian, value i of a uint32 at
bit `bits * i`: the order of MLX's `quantize`. Here packed values are the bytes of those words.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

assert sys.byteorder == "little", "packed bytes are read as little-endian words"


def quantize(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize `[..., head_dim]` of any float dtype.

    Returns packed uint8 `[..., head_dim * bits / 8]`, and bf16 scales and biases
    `[..., head_dim / group_size]`. NaN and infinity give NaN when read back, for their whole group.
    """
    groups = _grouped(x.float(), group_size)
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    biases = low.to(torch.bfloat16)
    levels = 2**bits - 1
    scales = ((high - low) / levels).to(torch.bfloat16)
    wide = scales.float()
    inverse = torch.where(wide > 0, 1 / wide, 0.0)
    values = ((groups - biases.float()) * inverse).round_().nan_to_num_(nan=0.0).clamp_(0, levels)
    packed = _pack(values.to(torch.uint8).flatten(-2), bits)
    return packed, scales.squeeze(-1), biases.squeeze(-1)


def dequantize(packed: Tensor, scales: Tensor, biases: Tensor, bits: int, group_size: int) -> Tensor:
    """The inverse of `quantize` in fp32: `q * scale + bias`."""
    values = _grouped(_unpack(packed, bits).float(), group_size)
    # The product is exact (8 bits of q times 8 of scale), so a fused multiply-add gives the same.
    return (values * scales.float().unsqueeze(-1)).add_(biases.float().unsqueeze(-1)).flatten(-2)


def _grouped(x: Tensor, group_size: int) -> Tensor:
    return x.view(*x.shape[:-1], -1, group_size)


def _pack(values: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return values
    return values[..., 0::2] | (values[..., 1::2] << 4)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
