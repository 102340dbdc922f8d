"""Quantization on write, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.native.oracle import (
    FORMATS,
    ISAS,
    Floats,
    _native,
    bf16_bits,
    from_bits,
    make_spec,
    native,
    write_page_row,
)

from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.runtimes.torch.kernels import AttentionBatch


def awkward(shape: tuple[int, ...], seed: int = 0) -> Floats:
    """Normal values with the cases that rounding trips over: constants, zeros, ties, tiny and huge."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape, dtype=np.float32)
    flat = x.reshape(-1, shape[-1])
    flat[0::7] = 0.0
    flat[1::7] = 3.25
    flat[2::7] = np.arange(shape[-1]) % 16 * 0.5
    flat[3::7] *= 1e-30
    flat[4::7] *= 1e30
    flat[5::14] = -0.0
    return x


def expected(
    spec: CacheSpec, arena: torch.Tensor, layer: int, k: Floats, v: Floats, slots: list[int]
) -> torch.Tensor:
    pages = arena.numpy().copy()
    for row, slot in enumerate(slots):
        page = pages[slot // spec.block_size]
        for half, x in zip(spec.layers[layer], (k[row], v[row]), strict=True):
            write_page_row(page, half, spec.group_size, slot % spec.block_size, x)
    return torch.from_numpy(pages)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("k_dim", "v_dim"), [(64, 64), (128, 64), (32, 96), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_oracles(
    isa: str, format: KVFormat, k_dim: int, v_dim: int, dtype: torch.dtype
) -> None:
    _native.set_isa(isa)
    spec = make_spec(format, 16, 3, k_dim, v_dim)
    k, v = awkward((37, 3, k_dim)), awkward((37, 3, v_dim), seed=1)
    if dtype == torch.bfloat16:
        k, v = from_bits(bf16_bits(k)), from_bits(bf16_bits(v))
    slots = np.random.default_rng(2).permutation(5 * 16)[:37].tolist()
    arena = torch.full((5, spec.block_nbytes), 0xAB, dtype=torch.uint8)
    wanted = expected(spec, arena, 1, k, v, slots)
    native.NativeKernels(spec).write_kv(
        arena, 1, torch.from_numpy(k).to(dtype), torch.from_numpy(v).to(dtype), torch.tensor(slots)
    )
    assert torch.equal(arena, wanted)


@pytest.mark.parametrize("isa", ISAS)
def test_many_rows_on_two_threads(isa: str) -> None:
    _native.set_isa(isa)
    spec = make_spec(KVFormat.K8V4, 128)
    k, v = awkward((700, 2, 64)), awkward((700, 2, 64), seed=1)
    arena = torch.zeros((6, spec.block_nbytes), dtype=torch.uint8)
    wanted = expected(spec, arena, 0, k, v, list(range(700)))
    torch.set_num_threads(2)
    native.NativeKernels(spec).write_kv(arena, 0, torch.from_numpy(k), torch.from_numpy(v), torch.arange(700))
    assert torch.equal(arena, wanted)


@pytest.mark.parametrize("format", FORMATS)
def test_slices_of_a_fused_projection(format: KVFormat) -> None:
    spec = make_spec(format)
    fused = torch.from_numpy(awkward((9, 4 * 64)))
    k, v = fused[:, :128].view(9, 2, 64), fused[:, 128:].view(9, 2, 64)
    strided, plain = (torch.zeros((1, spec.block_nbytes), dtype=torch.uint8) for _ in range(2))
    kernels, slots = native.NativeKernels(spec), torch.arange(9)
    kernels.write_kv(strided, 0, k, v, slots)
    kernels.write_kv(plain, 0, k.contiguous(), v.contiguous(), slots)
    assert torch.equal(strided, plain)
    transposed = k.transpose(1, 2).contiguous().transpose(1, 2)
    kernels.write_kv(strided, 0, transposed, v, slots)
    assert torch.equal(strided, plain)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_spoil_their_own_group_alone(isa: str, format: KVFormat, bad: float) -> None:
    _native.set_isa(isa)
    spec = make_spec(format, 16, 1)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 1, 64), dtype=np.float32))
    good, spoiled = (torch.zeros((1, spec.block_nbytes), dtype=torch.uint8) for _ in range(2))
    kernels, slots = native.NativeKernels(spec), torch.arange(2)
    kernels.write_kv(good, 0, x, x, slots)
    worse = x.clone()
    worse[1, 0, 5] = bad
    kernels.write_kv(spoiled, 0, worse, worse, slots)
    ones = torch.ones((1, 1, 64))
    for start in (0, 1):
        batch = AttentionBatch(
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([start], dtype=torch.int32),
            torch.tensor([[0]], dtype=torch.int32),
        )
        clean, other = (kernels.attend(arena, 0, ones, batch, 0.125, None) for arena in (good, spoiled))
        assert torch.equal(clean, other) if start == 0 else not other.isfinite().all()


def test_wrong_arguments_are_typed_errors() -> None:
    spec = make_spec()
    kernels = native.NativeKernels(spec)
    arena = torch.zeros((2, spec.block_nbytes), dtype=torch.uint8)
    x, slots = torch.zeros((3, 2, 64)), torch.arange(3)
    for bad in (torch.tensor([0, 1, 64]), torch.tensor([0, -1, 2]), torch.arange(2)):
        with pytest.raises(ValueError, match=r"slot|shape"):
            kernels.write_kv(arena, 0, x, x, bad)
    for k in (
        torch.zeros((3, 2, 32)),
        torch.zeros((3, 1, 64)),
        torch.zeros((3, 128)),
        torch.zeros((2, 2, 64)),
    ):
        with pytest.raises(ValueError, match="shape"):
            kernels.write_kv(arena, 0, k, x, slots)
    with pytest.raises(ValueError, match="arena"):
        kernels.write_kv(arena[:, :64].contiguous(), 0, x, x, slots)
    for k, v, s in ((x.double(), x, slots), (x, x.bfloat16(), slots), (x, x, slots.int())):
        with pytest.raises(TypeError):
            kernels.write_kv(arena, 0, k, v, s)
    with pytest.raises(TypeError):
        kernels.write_kv(arena[:, ::2], 0, x, x, slots)


def test_no_rows_write_nothing() -> None:
    spec = make_spec()
    arena = torch.zeros((1, spec.block_nbytes), dtype=torch.uint8)
    nothing = torch.zeros((0, 2, 64))
    native.NativeKernels(spec).write_kv(arena, 0, nothing, nothing, torch.zeros(0, dtype=torch.int64))
    assert not arena.any()
