"""Quantized products against NumPy, which reads the packed bytes by itself; and row by row to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.native.oracle import ISAS, _native
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

GROUP = PANEL = 32
SHAPES = [(1, 32), (32, 32), (33, 64), (100, 96), (192, 576)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).to(dtype)


def pack(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, float]:
    packed = torch.empty(_native.packed_nbytes(*weight.shape, bits), dtype=torch.uint8)
    return packed, _native.pack_weight(to_dlpack(weight), bits, to_dlpack(packed), 2)


def unpack(packed: torch.Tensor, outputs: int, inputs: int, bits: int) -> NDArray[np.float64]:
    """The weights that the packed bytes stand for, by the layout in native/linear.hpp."""
    data = PANEL * GROUP * bits // 8
    blocks = packed.numpy().reshape(-1, inputs // GROUP, data + 2 * PANEL * (1 if bits == 8 else 2))
    numbers = blocks[..., :data].reshape(*blocks.shape[:2], -1, PANEL, 4)
    halves = np.ascontiguousarray(blocks[..., data:]).view(np.float16).astype(np.float64)
    scale = halves[..., :PANEL]
    if bits == 8:
        steps, base = numbers.astype(np.float64) - 128, np.zeros_like(scale)
    else:
        steps = np.stack((numbers & 15, numbers >> 4), 3).reshape(*blocks.shape[:2], -1, PANEL, 4)
        steps, base = steps.astype(np.float64), halves[..., PANEL:]
    by_output = steps.transpose(0, 3, 1, 2, 4).reshape(-1, PANEL, inputs // GROUP, GROUP)
    scale, base = (x.transpose(0, 2, 1)[..., None] for x in (scale, base))
    weight: NDArray[np.float64] = (by_output * scale + base).reshape(-1, inputs)[:outputs]
    return weight


def rounded(x: torch.Tensor) -> Any:
    """Activations in 8 bits, a scale for each group."""
    groups = x.float().numpy().reshape(x.shape[0], -1, GROUP)
    top = np.abs(groups).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.rint(groups * np.where(top > 0, np.float32(127) / top, 0).astype(np.float32))
    return (q.astype(np.float64) * (top / np.float32(127))).reshape(x.shape)


def product(
    x: torch.Tensor, packed: torch.Tensor, bits: int, outputs: int, bias: Any = None, threads: int = 2
) -> torch.Tensor:
    out = torch.full((x.shape[0], outputs), torch.nan, dtype=x.dtype)
    added = None if bias is None else to_dlpack(bias)
    _native.linear(to_dlpack(x), to_dlpack(packed), bits, added, to_dlpack(out), threads)
    return out


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_rounds_to_the_nearest_step(shape: tuple[int, int], bits: int) -> None:
    weight = normal(*shape)
    packed, error = pack(weight, bits)
    stored = unpack(packed, *shape, bits)
    exact = weight.double().numpy()
    groups = exact.reshape(shape[0], -1, GROUP)
    spread = 2 * np.abs(groups).max(-1) if bits == 8 else groups.max(-1) - groups.min(-1)
    step = spread / (254 if bits == 8 else 15)
    off = np.abs(stored - exact).reshape(groups.shape).max(-1)
    assert (off <= step * 0.5 + np.abs(groups).max(-1) * 2e-3).all()
    measured = np.sqrt(((stored - exact) ** 2).sum() / (exact**2).sum())
    assert error == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(isa: str, bits: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    _native.set_isa(isa)
    packed, _ = pack(normal(*shape), bits)
    weight = unpack(packed, *shape, bits)
    bias = normal(shape[0], seed=3)
    for rows in (1, 5, 29):
        x = normal(rows, shape[1], seed=rows, dtype=dtype)
        wanted = rounded(x) @ weight.T + bias.double().numpy()
        tolerance = 2e-5 if dtype is torch.float32 else 8e-3
        got = product(x, packed, bits, shape[0], bias)
        np.testing.assert_allclose(got.double().numpy(), wanted, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_depends_on_itself_alone(isa: str, bits: int) -> None:
    _native.set_isa(isa)
    packed, _ = pack(normal(70, 96), bits)
    x = normal(401, 96, dtype=torch.bfloat16)
    whole = product(x, packed, bits, 70, threads=2)
    for begin, end in [(0, 1), (1, 3), (3, 9), (9, 22), (22, 250), (250, 401)]:
        for threads in (1, 2, 3):
            assert torch.equal(product(x[begin:end], packed, bits, 70, threads=threads), whole[begin:end])


@pytest.mark.parametrize("bits", [8, 4])
def test_instruction_sets_agree_to_the_bit(bits: int) -> None:
    packed, _ = pack(normal(70, 96), bits)
    x = normal(13, 96)
    results = []
    for isa in ISAS:
        if isa != "portable":  # it has no fused multiply-add
            _native.set_isa(isa)
            results.append(product(x, packed, bits, 70))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
def test_extreme_inputs(isa: str, bits: int) -> None:
    _native.set_isa(isa)
    weight = normal(32, 64)
    weight[3] = 0
    weight[4] *= 1e-6
    weight[5] = 1.0
    packed, _ = pack(weight, bits)
    x = normal(4, 64)
    x[1] = 0
    x[2, 40] = torch.nan
    x[3, 2] = torch.inf
    got = product(x, packed, bits, 32)
    assert got[0].isfinite().all()
    assert not got[1].any()
    assert not got[2:].isfinite().any(), "what is no number stays visible"
    stored = unpack(packed, 32, 64, bits)
    np.testing.assert_allclose(stored[5], 1.0, rtol=1e-3)
    np.testing.assert_allclose(
        stored[4], weight[4].numpy(), atol=4e-6, err_msg="a scale's least step is 6e-8"
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_strided_rows(bits: int) -> None:
    packed, _ = pack(normal(32, 64), bits)
    wide = normal(7, 200)
    assert torch.equal(
        product(wide[:, 32:96], packed, bits, 32), product(wide[:, 32:96].contiguous(), packed, bits, 32)
    )


@pytest.mark.parametrize("outputs", [64, 70])
def test_logits_are_the_product_before_it_is_rounded(outputs: int) -> None:
    packed, _ = pack(normal(outputs, 64), 8)
    x = normal(3, 64, seed=1, dtype=torch.bfloat16)
    wide = torch.full((3, outputs), torch.nan)
    _native.linear(to_dlpack(x), to_dlpack(packed), 8, None, to_dlpack(wide), 2)
    assert torch.equal(wide.bfloat16(), product(x, packed, 8, outputs))
    assert not torch.equal(wide.bfloat16().float(), wide)


def test_four_bits_come_back_exactly() -> None:
    """Weights that were four bits before: what `auto` looks for."""
    q = torch.from_numpy(np.random.default_rng(0).integers(0, 16, (64, 64))).float()
    q[:, ::32], q[:, 1::32] = 0, 15
    weight = (q * 0.03 - 0.2).bfloat16().float()
    assert pack(weight, 4)[1] < 0.005
    assert pack(normal(64, 64), 4)[1] > 0.05


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda x, p, o: (x[:, :32], p, 8, None, o), ValueError),
        (lambda x, p, o: (x, p[:-1], 8, None, o), ValueError),
        (lambda x, p, o: (x, p, 5, None, o), ValueError),
        (lambda x, p, o: (x, p, 4, None, o), ValueError),
        (lambda x, p, o: (x, p, 8, None, o[:2]), ValueError),
        (lambda x, p, o: (x, p, 8, None, o.bfloat16()), TypeError),
        (lambda x, p, o: (x.double(), p, 8, None, o), TypeError),
        (lambda x, p, o: (x, p, 8, torch.zeros(5), o), ValueError),
        (lambda x, p, o: (x, p, 8, torch.zeros(32).bfloat16(), o), TypeError),
        (lambda x, p, o: (x, p.view(torch.int8), 8, None, o), TypeError),
        (lambda x, p, o: (x.T.contiguous().T, p, 8, None, o), ValueError),
    ],
)
def test_wrong_arguments_are_refused(make: Any, error: type[Exception]) -> None:
    packed, _ = pack(normal(32, 64), 8)
    x, p, bits, bias, out = make(normal(3, 64), packed, torch.empty(3, 32))
    with pytest.raises(error):
        _native.linear(
            to_dlpack(x), to_dlpack(p), bits, None if bias is None else to_dlpack(bias), to_dlpack(out), 1
        )
