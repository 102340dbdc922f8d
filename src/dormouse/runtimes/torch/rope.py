"""Rotary position embedding in torch: frequencies, and tables of cosines and sines.

The frequency formulas are those of transformers' `modeling_rope_utils.py` (5.x), which tests compare with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dormouse.runtimes.rope import Rope

_TABLE_STEP = 4096


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position of each rotated pair, `[head_dim / 2]` fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    base = 1.0 / (rope.theta**exponents)
    match rope.type:
        case "linear":
            return base / rope.factor
        case "llama3":
            return _llama3(rope, base)
        case "yarn":
            return _yarn(rope, head_dim, rope.theta**exponents)
    return base


def _llama3(rope: Rope, base: Tensor) -> Tensor:
    """Long waves slowed by `factor`, short ones kept, those between interpolated."""
    context, low, high = rope.original_context, rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / base
    slowed = torch.where(wavelength > context / low, base / rope.factor, base)
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * slowed / rope.factor + smooth * slowed
    is_between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(is_between, between, slowed)


def _yarn(rope: Rope, head_dim: int, wavelength: Tensor) -> Tensor:
    """Pairs that turn often extrapolate, pairs that turn seldom interpolate, with a ramp between."""

    def pair_that_turns(times: float) -> float:
        turns = math.log(rope.original_context / (times * 2 * math.pi))
        return head_dim * turns / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    extrapolated = 1 - ramp
    return 1.0 / (rope.factor * wavelength) * (1 - extrapolated) + 1.0 / wavelength * extrapolated


@dataclass(frozen=True, slots=True)
class RopeTable:
    """`cos` and `sin` of each rotated pair, fp32 `[positions, head_dim / 2]`."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, rope: Rope, head_dim: int, num_positions: int, device: torch.device) -> RopeTable:
        """The table for positions 0 up to at least `num_positions`.

        Angles are fp32 products as in training; their cosines are taken in fp64 and in steps of one fixed
        size, so that an entry does not depend on the table's length.
        """
        turns: NDArray[np.float32] = frequencies(rope, head_dim).numpy()
        cos, sin = [], []
        for start in range(0, num_positions, _TABLE_STEP):
            positions = np.arange(start, start + _TABLE_STEP, dtype=np.float32)
            angles = (positions[:, None] * turns).astype(np.float64)
            cos.append((np.cos(angles) * rope.magnitude).astype(np.float32))
            sin.append((np.sin(angles) * rope.magnitude).astype(np.float32))
        return cls(*(torch.from_numpy(np.concatenate(parts)).to(device) for parts in (cos, sin)))
