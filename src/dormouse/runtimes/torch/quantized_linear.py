"""Linear layers with weights of 8 or 4 bits, for CPUs: whole-number products of the native module.

One packed copy serves both ends. At few rows the bytes of the weight are the limit, and there are half or a
third as many as in bf16; at many rows the arithmetic is, and products of bytes are faster than those of bf16.
Activations are rounded to 8 bits, a scale for 32 of them, as each product begins (llama.cpp's Q8_0 does the
same). Every row stands alone, so these layers are row invariant by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # public, though torch re-exports it

from dormouse import _native
from dormouse.runtimes.torch.linear import Linear, make_linear

GROUP = 32
"""Inputs that share a scale; what no multiple of it has, stays unquantized."""

EXACT = 0.01
"""Relative error up to which four bits are taken by `auto`: eight bits of unquantized weights lose 0.5%, four
bits 7 to 10%. Weights that were four bits before they were converted to a float format lose 0.1%."""

Bits = Literal[4, 8]


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """See `Linear`. `packed` is uint8, laid out as native/linear.hpp says; `bias` fp32 `[outputs]`."""

    packed: Tensor
    bits: Bits
    outputs: int
    bias: Tensor | None

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, bits: Bits) -> tuple[QuantizedLinear, float]:
        """Quantize `weight` `[outputs, inputs]`; also gives the relative error, root mean square.

        Groups of 32 inputs share an fp16 scale; with four bits also an fp16 minimum. Raises ValueError
        when the inputs are no multiple of 32.
        """
        outputs, inputs = weight.shape
        packed = torch.empty(_native.packed_nbytes(outputs, inputs, bits), dtype=torch.uint8)
        wide = weight.float().contiguous()
        error = _native.pack_weight(to_dlpack(wide), bits, to_dlpack(packed), torch.get_num_threads())
        return cls(packed, bits, outputs, None if bias is None else bias.float()), error

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        return self._product(x, x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """See `Linear`; sums are never rounded to the dtype of `x`."""
        return self._product(x, torch.float32)

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        out = torch.empty((x.shape[0], self.outputs), dtype=dtype)
        bias = None if self.bias is None else to_dlpack(self.bias)
        _native.linear(
            to_dlpack(x), to_dlpack(self.packed), self.bits, bias, to_dlpack(out), torch.get_num_threads()
        )
        return out


def quantize(weight: Tensor, bias: Tensor | None, bits: Bits) -> Linear:
    """The weight in `bits`; in its own dtype where the groups do not fit."""
    if weight.shape[1] % GROUP:
        return make_linear(weight, bias)
    return QuantizedLinear.pack(weight, bias, bits)[0]


def quantize_losslessly(weight: Tensor, bias: Tensor | None) -> Linear:
    """The weight in four bits if these were its origin, else in eight."""
    if weight.shape[1] % GROUP == 0:
        linear, error = QuantizedLinear.pack(weight, bias, 4)
        if error <= EXACT:
            return linear
    return quantize(weight, bias, 8)


MAKERS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {
    "auto": quantize_losslessly,
    "int8": partial(quantize, bits=8),
    "int4": partial(quantize, bits=4),
}
