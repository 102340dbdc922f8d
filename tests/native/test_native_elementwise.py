"""Norms, rotary embedding and gated activations against float64 NumPy, and row by row to the bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.native.oracle import ISAS, _native, native

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2}
DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).to(dtype)


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), wanted, atol=tolerance, rtol=tolerance)


def normed(x: torch.Tensor, weight: torch.Tensor, add_one: bool) -> torch.Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (weight.double() + add_one)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 16), (7, 576), (33, 2048)])
@pytest.mark.parametrize("add_one", [False, True])
def test_norms(isa: str, dtype: torch.dtype, rows: int, dim: int, add_one: bool) -> None:
    _native.set_isa(isa)
    x, weight, residual = (
        normal(rows, dim, dtype=dtype),
        normal(dim, seed=1, dtype=dtype),
        normal(rows, dim, seed=2),
    )
    residual = residual.to(dtype)
    out = native.rms_norm(x, weight, 1e-5, add_one=add_one)
    close(out, normed(x, weight, add_one))
    assert torch.equal(native.rms_norm(x[-1:], weight, 1e-5, add_one=add_one), out[-1:])
    total = x + residual
    out = native.add_rms_norm(x, residual, weight, 1e-5, add_one=add_one)
    assert torch.equal(residual, total)
    close(out, normed(total, weight, add_one))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotated"), [(16, 16), (64, 64), (96, 48), (128, 128)])
def test_rope(isa: str, dtype: torch.dtype, dim: int, rotated: int) -> None:
    _native.set_isa(isa)
    fused = normal(9, 3 * dim + 32, dtype=dtype)
    x = fused[:, 16 : 16 + 3 * dim].view(9, 3, dim)
    angles = torch.outer(torch.arange(50.0), 10000.0 ** -torch.linspace(0, 1, rotated // 2))
    positions = torch.tensor([0, 3, 49, 7, 7, 1, 2, 30, 31])
    before, around = x.double(), fused.clone()
    native.rope_(x, angles.cos(), angles.sin(), positions)
    cos, sin = angles.double().cos()[positions][:, None], angles.double().sin()[positions][:, None]
    a, b, rest = before.tensor_split((rotated // 2, rotated), -1)
    close(x, torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1))
    assert torch.equal(fused[:, :16], around[:, :16])
    assert torch.equal(fused[:, -16:], around[:, -16:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "ffn"), [(1, 16), (5, 1536), (64, 1008)])
def test_gates(isa: str, dtype: torch.dtype, rows: int, ffn: int) -> None:
    _native.set_isa(isa)
    x = normal(rows, 2 * ffn, dtype=dtype) * 4
    x[0, :4] = torch.tensor([200.0, -200.0, 0.0, -90.0])
    gate, up = x.double().chunk(2, -1)
    out = native.silu_mul(x)
    close(out, torch.nn.functional.silu(gate) * up)
    assert torch.equal(native.silu_mul(x[-1:]), out[-1:])
    close(native.gelu_tanh_mul(x), torch.nn.functional.gelu(gate, approximate="tanh") * up)


def test_threads_change_no_bit() -> None:
    x, weight = normal(300, 1024), normal(1024, seed=1)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((native.rms_norm(x, weight, 1e-5), native.silu_mul(x)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_wrong_arguments_are_typed_errors() -> None:
    x, weight = normal(3, 64), normal(64)
    angles, positions = torch.zeros(5, 32), torch.tensor([0, 1, 4])
    misshapen: list[Callable[[], object]] = [
        lambda: native.rms_norm(normal(3, 20), normal(20), 1e-5),
        lambda: native.rms_norm(x, normal(32), 1e-5),
        lambda: native.add_rms_norm(x, normal(2, 64), weight, 1e-5),
        lambda: native.add_rms_norm(x, normal(64, 3).T, weight, 1e-5),
        lambda: native.rope_(x.view(3, 1, 64), angles, angles, torch.tensor([0, 1, 5])),
        lambda: native.rope_(x.view(3, 1, 64), angles, angles, torch.tensor([0, -1, 2])),
        lambda: native.rope_(x.view(3, 1, 64), angles, angles[:4], positions),
        lambda: native.rope_(x.view(3, 2, 32), angles, angles, positions),
        lambda: native.silu_mul(normal(3, 33)),
        lambda: native.silu_mul(normal(3, 40)),
    ]
    for call in misshapen:
        with pytest.raises(ValueError, match=r"must|outside"):
            call()
    mistyped: list[Callable[[], object]] = [
        lambda: native.rms_norm(x, weight.bfloat16(), 1e-5),
        lambda: native.rms_norm(x.double(), weight.double(), 1e-5),
        lambda: native.rope_(x.view(3, 1, 64), angles.double(), angles.double(), positions),
        lambda: native.silu_mul(x.half()),
    ]
    for call in mistyped:
        with pytest.raises(TypeError):
            call()
