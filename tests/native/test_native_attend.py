"""Attention over pages against float64 NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tests.native.oracle import FORMATS, ISAS, Case, _native, make_spec, native

from dormouse.domain.cache_spec import KVFormat

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
Chunks = list[tuple[int, int, int]]


def check(case: Case, heads: int, dtype: torch.dtype, chunks: Chunks, window: int | None = None) -> None:
    rows = sum(tokens for _, _, tokens in chunks)
    q = case.tensor(rows, heads, case.spec.k_head_dim).to(dtype)
    out = case.attend(q, chunks, window)
    assert out.dtype == dtype
    assert out.shape == (rows, heads, case.spec.v_head_dim)
    np.testing.assert_allclose(out.double().numpy(), case.expected(q, chunks, window), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_chunks(isa: str, format: KVFormat, dtype: torch.dtype) -> None:
    _native.set_isa(isa)
    case = Case(make_spec(format), [200, 1, 33, 129])
    check(case, 6, dtype, [(0, 150, 50), (1, 0, 1), (2, 32, 1), (3, 0, 129)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("k_dim", "v_dim"), [(16, 16), (32, 48), (80, 80), (96, 112), (128, 64), (192, 128), (256, 256)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(isa: str, k_dim: int, v_dim: int, dtype: torch.dtype) -> None:
    _native.set_isa(isa)
    whole_groups = k_dim % 32 == 0 and v_dim % 32 == 0
    spec = make_spec(KVFormat.Q8 if whole_groups else KVFormat.BF16, 16, 1, k_dim, v_dim)
    check(Case(spec, [140]), 2, dtype, [(0, 120, 20)])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 511, 512, 513, 1025])
@pytest.mark.parametrize("block_size", [16, 128, 512])
def test_edges_of_blocks_tiles_and_splits(length: int, block_size: int) -> None:
    case = Case(make_spec(KVFormat.K8V4, block_size, 1), [length])
    check(case, 2, torch.float32, [(0, length - 1, 1)])
    check(case, 2, torch.bfloat16, [(0, max(0, length - 7), min(7, length))])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [1, 2, 16, 100, 128, 129, 600, 5000])
def test_windows(isa: str, window: int) -> None:
    _native.set_isa(isa)
    case = Case(make_spec(KVFormat.Q8), [700, 90])
    check(case, 4, torch.float32, [(0, 660, 40), (1, 0, 90), (0, 699, 1)], window)
    check(case, 4, torch.bfloat16, [(0, 500, 200), (1, 89, 1)], window)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8, 16])
def test_grouped_heads(isa: str, group: int) -> None:
    _native.set_isa(isa)
    case = Case(make_spec(kv_heads=3), [70])
    check(case, 3 * group, torch.float32, [(0, 51, 19)])
    check(case, 3 * group, torch.bfloat16, [(0, 69, 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_apart(dtype: torch.dtype) -> None:
    """One key takes all the weight, then a later one: the running maximum moves far."""
    case = Case(make_spec(KVFormat.F32, 32, 1), [600])
    q = (case.tensor(3, 2, 64) * 60).to(dtype)
    chunks = [(0, 597, 3)]
    np.testing.assert_allclose(
        case.attend(q, chunks).double().numpy(), case.expected(q, chunks), atol=10 * TOLERANCE[dtype]
    )


def test_pages_behind_the_window_are_not_looked_up() -> None:
    case = Case(make_spec(block_size=16), [100])
    q = case.tensor(2, 2, 64)
    wanted = case.attend(q, [(0, 98, 2)], window=20)
    case.tables[0][:4] = [-1] * 4
    assert torch.equal(case.attend(q, [(0, 98, 2)], window=20), wanted)


def test_empty_calls() -> None:
    case = Case(make_spec(), [40])
    nothing = case.tensor(0, 2, 64)
    assert case.attend(nothing, [(0, 40, 0)]).shape == (0, 2, 64)
    q = case.tensor(2, 2, 64)
    alone = case.attend(q, [(0, 38, 2)])
    assert torch.equal(case.attend(q, [(0, 0, 0), (0, 38, 2), (0, 5, 0)]), alone)


def test_strided_queries() -> None:
    case = Case(make_spec(), [40])
    fused = case.tensor(5, 512)
    q = fused[:, 64:320].view(5, 4, 64)
    chunks = [(0, 35, 5)]
    wanted = case.attend(q.contiguous(), chunks)
    assert torch.equal(case.attend(q, chunks), wanted)
    assert torch.equal(case.attend(q.transpose(1, 2).contiguous().transpose(1, 2), chunks), wanted)
    row = q[:1]
    assert torch.equal(
        case.attend(row.expand(2, 4, 64), [(0, 30, 1), (0, 30, 1)])[0], case.attend(row, [(0, 30, 1)])[0]
    )


def test_wrong_arguments_are_typed_errors() -> None:
    case = Case(make_spec(), [40])
    kernels = native.NativeKernels(case.spec)
    q, batch = case.tensor(2, 4, 64), case.batch([(0, 38, 2)])

    def attend(
        q: torch.Tensor = q,
        scale: float = 1.0,
        window: int | None = None,
        parts: dict[str, torch.Tensor] | None = None,
    ) -> None:
        kernels.attend(case.arena, 0, q, dataclasses.replace(batch, **(parts or {})), scale, window)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    attend()
    for wrong in (case.tensor(2, 3, 64), case.tensor(2, 4, 32), case.tensor(2, 256), case.tensor(3, 4, 64)):
        with pytest.raises(ValueError, match=r"shape|heads|q must|row_offsets"):
            attend(wrong)
    for offsets in (ints(0, 1), ints(1, 2), ints(0, 1, 2), ints(2, 0)):
        with pytest.raises(ValueError, match="row_offsets"):
            attend(parts={"row_offsets": offsets})
    for start in (-1, 63, 2**31 - 1):
        with pytest.raises(ValueError, match="page_table"):
            attend(parts={"starts": ints(start)})
    for page in (-1, 3):
        with pytest.raises(ValueError, match="page_table"):
            attend(parts={"page_table": ints(page, page)[None]})
    with pytest.raises(ValueError, match="scale"):
        attend(scale=0.0)
    with pytest.raises(ValueError, match="scale"):
        attend(scale=float("nan"))
    with pytest.raises(ValueError, match="window"):
        attend(window=-1)
    for parts in ({"starts": batch.starts.long()}, {"page_table": batch.page_table.float()}):
        with pytest.raises(TypeError):
            attend(parts=parts)
    with pytest.raises(TypeError):
        attend(q.half())
    with pytest.raises(ValueError, match="cannot run"):
        _native.set_isa("sparc")
