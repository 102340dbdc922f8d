"""The measured claims that row invariance rests on, held on the machine that runs the tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dormouse.runtimes.torch.linear import ROW_TILE, PackedLinear, PlainLinear, pad_rows
from dormouse.runtimes.torch.row_ops import add_rms_norm, gelu_tanh_mul, rms_norm, silu_mul

ROWS = (1, 2, 3, 7, 11, 16, 17, 33, 255, 300)
DTYPES = (torch.float32, torch.bfloat16)
Function = Callable[[Tensor], Tensor]


def is_row_invariant(function: Function, x: Tensor) -> bool:
    torch.set_num_threads(2)
    whole = function(x)
    parts = ((start, start + count) for count in ROWS for start in (0, len(x) - count))
    return all(torch.equal(function(x[start:end].clone()), whole[start:end]) for start, end in parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(64, 96), (100, 64), (576, 960), (1536, 576), (4096, 256)])
@pytest.mark.parametrize("kind", [PackedLinear.pack, PlainLinear])
def test_linear_layers(
    kind: Callable[[Tensor, Tensor], Function], size: tuple[int, int], dtype: torch.dtype
) -> None:
    columns, outputs = size
    half, order = columns // 2, torch.randperm(columns // 2)
    weight, x = torch.randn(outputs, half).to(dtype), torch.randn(301, half).to(dtype)
    # Sums that cancel leave rounding error alone, so that the order of summing shows in bf16 too.
    linear = kind(torch.cat((weight, -weight[:, order]), 1), torch.zeros(outputs, dtype=dtype))
    assert is_row_invariant(linear, torch.cat((x, x[:, order]), 1))


@pytest.mark.parametrize("kind", [PackedLinear.pack, PlainLinear])
def test_linear_layers_compute_what_they_say(kind: Callable[[Tensor, Tensor], Function]) -> None:
    weight, bias, x = torch.randn(33, 65), torch.randn(33), torch.randn(5, 65)
    torch.testing.assert_close(kind(weight, bias)(x), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 100, 1536, 2049])
def test_norms_and_activations(width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(301, 2 * width).to(dtype) * 3, torch.randn(2 * width).to(dtype)
    for function in (silu_mul, gelu_tanh_mul, lambda x: rms_norm(x, weight, 1e-6)):
        assert is_row_invariant(function, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_and_norming_is_both_in_one(dtype: torch.dtype) -> None:
    x, residual, weight = (
        torch.randn(5, 64).to(dtype),
        torch.randn(5, 64).to(dtype),
        torch.randn(64).to(dtype),
    )
    total = x + residual
    normed = add_rms_norm(x, residual, weight, 1e-6, add_one=True)
    assert torch.equal(residual, total)
    torch.testing.assert_close(normed, F.rms_norm(total, (64,), weight + 1, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_compute_what_they_say(dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 40, 50, dtype=dtype) * 3
    both = torch.cat((gate, up), -1)
    torch.testing.assert_close(silu_mul(both), F.silu(gate) * up)
    torch.testing.assert_close(gelu_tanh_mul(both), F.gelu(gate, approximate="tanh") * up)


def test_bf16_silu_is_the_same_in_vectors_and_alone() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    # Rows of one value that lie apart: torch cannot take them together as a vector.
    alone = F.silu(every.repeat_interleave(2)[::2].unsqueeze(1))[:, 0]
    assert torch.equal(F.silu(every), alone)


def test_rows_are_padded_to_whole_tiles() -> None:
    assert [len(pad_rows(torch.ones(count, 3), ROW_TILE)) for count in (1, 16, 17)] == [ROW_TILE, 16, 32]
