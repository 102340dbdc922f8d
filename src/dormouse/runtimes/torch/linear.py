"""Linear layers that are row invariant: a row of the result depends on that row of the input alone.

Libraries choose the order of a sum by the number of rows. Measured with torch 2.13 on an AVX-512 AMD EPYC:
oneDNN differs at one row when there are more than about 1000 columns, in bf16 as in fp32, though rounding to
bf16 hides all but one value in thousands; from two rows on it never does. MKL's fp32 products differ below
12 rows. As another CPU may differ elsewhere, `row_tile` finds out where it runs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

ROW_TILE = 16
"""Rows of which whole tiles are taken to be safe where nothing was measured."""

_TILES = (1, 2, 4, 8, ROW_TILE)
_PROBED_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64, 127, 128)
_MAX_PROBED_OUTPUTS = 1024

log = logging.getLogger(__name__)


class Linear(Protocol):
    """`x @ weight.T + bias` for `x` `[rows, in]`."""

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, out]` in the dtype of `x`."""

    def wide(self, x: Tensor) -> Tensor:
        """`[rows, out]` in fp32, for logits: as exact as the product comes."""

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """oneDNN with the weight reordered once, not in each call: 2 to 3 times faster at few rows.

    `tile`: rows are padded to a multiple of it.
    """

    weight: Tensor
    bias: Tensor | None
    tile: int
    nbytes: int

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Reorder `weight` `[out, in]` (bf16 or fp32, on the CPU)."""
        outputs, columns = weight.shape
        tile = row_tile(columns, min(outputs, _MAX_PROBED_OUTPUTS), weight.dtype)
        return cls(_reorder(weight), bias, tile, _nbytes(weight, bias))

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows % self.tile == 0:
            return _product(x, self.weight, self.bias)
        return _product(pad_rows(x, self.tile), self.weight, self.bias)[:rows]

    def wide(self, x: Tensor) -> Tensor:
        """See `Linear`; oneDNN's product is rounded to the dtype of `x` before."""
        return self(x).float()


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
        return F.linear(pad_rows(x, ROW_TILE), self.weight, self.bias)[: x.shape[0]]

    def wide(self, x: Tensor) -> Tensor:
        """See `Linear`; the product is rounded to the dtype of `x` before."""
        return self(x).float()


def make_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """The fastest row invariant linear layer for a `[out, in]` weight on its device."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type == "cpu" and has_onednn:
        return PackedLinear.pack(weight, bias)
    return PlainLinear(weight, bias)


def pad_rows(x: Tensor, tile: int) -> Tensor:
    """`x` `[rows, n]` with zero rows added up to a multiple of `tile`."""
    missing = -x.shape[0] % tile
    return F.pad(x, (0, 0, 0, missing)) if missing else x


@cache
def row_tile(columns: int, outputs: int, dtype: torch.dtype) -> int:
    """The least tile in whole multiples of which oneDNN's products are row invariant on this CPU.

    The probe's sums cancel: what is left is rounding error alone, so another order of summing shows in nearly
    every value, in bf16 too. Takes 0.1 to 0.6 s a shape, once per process.
    """
    generator = torch.Generator().manual_seed(0)
    half = columns // 2
    weight = torch.randn(outputs, half, generator=generator).to(dtype)
    x = torch.randn(2 * max(_PROBED_ROWS), half, generator=generator).to(dtype)
    packed, x = _reorder(torch.cat((weight, -weight), 1)), torch.cat((x, x), 1)
    whole = _product(x, packed, None)
    differing = [
        count for count in _PROBED_ROWS if not torch.equal(_product(x[:count], packed, None), whole[:count])
    ]
    for tile in _TILES:
        if not any(count % tile == 0 for count in differing):
            return tile
    log.warning("products of %d columns in %s differ with %s rows; sleep may show", columns, dtype, differing)
    return ROW_TILE


def _reorder(weight: Tensor) -> Tensor:
    # The row count is only a hint for the layout; without it one layout serves prefill and decode.
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def _nbytes(weight: Tensor, bias: Tensor | None) -> int:
    return weight.nbytes + (0 if bias is None else bias.nbytes)
