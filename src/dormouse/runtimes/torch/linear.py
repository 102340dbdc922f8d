"""Linear layers that are row invariant: a row of the result depends on that row of the input alone.

Measured on CPUs (torch 2.13; a test holds it where it runs): MKL's fp32 products differ below 12 rows and
oneDNN's at one row, while from `ROW_TILE` rows on, in whole tiles, both are stable. oneDNN's bf16 products
are the same at any number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

ROW_TILE = 16
"""Rows from which fp32 matrix products are row invariant, if there are whole tiles of them."""


class Linear(Protocol):
    """`x @ weight.T + bias` for `x` `[rows, in]`; gives `[rows, out]` in the same dtype."""

    def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """oneDNN with the weight reordered once, not in each call: 2 to 3 times faster at few rows."""

    weight: Tensor
    bias: Tensor | None
    pads: bool
    nbytes: int

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Reorder `weight` `[out, in]` (bf16 or fp32, on the CPU)."""
        # The row count is only a hint for the layout; without it one layout serves prefill and decode.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        return cls(packed, bias, weight.dtype is torch.float32, _nbytes(weight, bias))

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if self.pads:
            x = pad_rows(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y[:rows] if self.pads else y


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """`F.linear`, for devices and builds without oneDNN; always in whole tiles of rows."""

    weight: Tensor
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return _nbytes(self.weight, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(pad_rows(x), self.weight, self.bias)[: x.shape[0]]


def make_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """The fastest row invariant linear layer for a `[out, in]` weight on its device."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type == "cpu" and has_onednn:
        return PackedLinear.pack(weight, bias)
    return PlainLinear(weight, bias)


def pad_rows(x: Tensor) -> Tensor:
    """`x` `[rows, n]` with zero rows added up to a multiple of `ROW_TILE`."""
    missing = -x.shape[0] % ROW_TILE
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _nbytes(weight: Tensor, bias: Tensor | None) -> int:
    return weight.nbytes + (0 if bias is None else bias.nbytes)
