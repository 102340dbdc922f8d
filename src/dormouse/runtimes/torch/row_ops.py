"""What is computed row by row between the products, in plain torch for every device. See `RowOps`.

Row invariance on CPUs: torch finishes what its vector loop leaves over with scalar code, and where that is
depends on the number of rows and threads. For fp32 `silu`, `sigmoid` and `gelu` the two disagree in the last
bit; for `exp`, `tanh` and `rsqrt` they do not, and bf16 `silu` agrees on all 65536 inputs. So only these are
used. Found with torch 2.13 on AVX-512; a test holds it where it runs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, add_one: bool = False) -> Tensor:
    """See `RowOps.rms_norm`."""
    wide = weight.float() + 1 if add_one else weight.float()
    return F.rms_norm(x.float(), wide.shape, wide, eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, add_one: bool = False) -> Tensor:
    """See `RowOps.add_rms_norm`."""
    return rms_norm(residual.add_(x), weight, eps, add_one=add_one)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """See `RowOps.rope_`."""
    cos, sin = cos[positions, None], sin[positions, None]
    first, second = x.float().chunk(2, -1)
    x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `RowOps.silu_mul`."""
    gate, up = gate_up.chunk(2, -1)
    if gate.dtype is torch.bfloat16:
        return F.silu(gate).mul_(up)
    return torch.neg(gate).exp_().add_(1).reciprocal_().mul_(gate).mul_(up)


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """See `RowOps.gelu_tanh_mul`."""
    gate, up = gate_up.chunk(2, -1)
    wide = gate.float()
    inner = (wide * wide).mul_(0.044715).add_(1).mul_(wide).mul_(math.sqrt(2 / math.pi))
    return inner.tanh_().add_(1).mul_(wide).mul_(0.5).mul_(up).to(gate.dtype)
