"""A row's bits depend on its past alone: not on chunks, company, threads or padding."""

from __future__ import annotations

import pytest
import torch
from tests.native.oracle import FORMATS, ISAS, Case, _native, make_spec, native

from dormouse.domain.cache_spec import KVFormat

DTYPES = [torch.float32, torch.bfloat16]


def by_chunks(case: Case, q: torch.Tensor, sizes: list[int], window: int | None = None) -> torch.Tensor:
    """The first sequence from position 0, in chunks of these sizes, each in its own call."""
    parts, start = [], 0
    for size in sizes:
        parts.append(case.attend(q[start : start + size], [(0, start, size)], window))
        start += size
    assert start == len(q)
    return torch.cat(parts)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks(isa: str, format: KVFormat, dtype: torch.dtype) -> None:
    _native.set_isa(isa)
    case = Case(make_spec(format), [300])
    q = case.tensor(300, 6, 64).to(dtype)
    whole = by_chunks(case, q, [300])
    assert torch.equal(by_chunks(case, q, [1] * 300), whole)
    assert torch.equal(by_chunks(case, q, [7] * 42 + [6]), whole)
    assert torch.equal(by_chunks(case, q, [128, 1, 128, 43]), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 100, 128, 700])
@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8])
def test_long_chunks_and_single_rows(dtype: torch.dtype, window: int | None, heads: int) -> None:
    case = Case(make_spec(KVFormat.K8V4, 64, 1), [1700])
    q = case.tensor(1700, heads, 64).to(dtype)
    whole = by_chunks(case, q, [1700], window)
    assert torch.equal(by_chunks(case, q, [513, 1, 511, 675], window), whole)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for position in (0, 15, 16, 511, 512, 513, 1023, 1024, 1699):
            alone = case.attend(q[position : position + 1], [(0, position, 1)], window)
            assert torch.equal(alone[0], whole[position])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_alone_and_in_company(isa: str, dtype: torch.dtype) -> None:
    _native.set_isa(isa)
    case = Case(make_spec(), [600, 90, 1200, 17])
    chunks = [(2, 1199, 1), (0, 560, 40), (1, 89, 1), (3, 0, 17), (2, 1100, 3)]
    q = case.tensor(sum(tokens for _, _, tokens in chunks), 6, 64).to(dtype)
    together, taken = case.attend(q, chunks, padding=3), 0
    for chunk in chunks:
        rows = slice(taken, taken + chunk[2])
        assert torch.equal(case.attend(q[rows], [chunk]), together[rows])
        taken += chunk[2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads(dtype: torch.dtype) -> None:
    case = Case(make_spec(kv_heads=3), [2000, 800])
    chunks = [(0, 1999, 1), (1, 700, 100)]
    q = case.tensor(101, 9, 64).to(dtype)
    outs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outs.append(torch.cat([case.attend(q, chunks), case.attend(q[:1], chunks[:1])]))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_token_spoils_no_earlier_row(dtype: torch.dtype) -> None:
    case = Case(make_spec(KVFormat.Q8), [128])
    q = case.tensor(64, 6, 64).to(dtype)
    before = case.attend(q, [(0, 0, 64)])
    bad = torch.full((1, 2, 64), float("nan"))
    slot = torch.tensor([case.tables[0][2] * 32])
    native.NativeKernels(case.spec).write_kv(case.arena, case.layer, bad, bad, slot)
    assert torch.equal(case.attend(q, [(0, 0, 64)]), before)


def test_float_sums_have_one_order_on_every_instruction_set() -> None:
    """Not promised, but true of those with fused multiply-add: a store may move between such machines."""
    case = Case(make_spec(), [300])
    q = case.tensor(20, 6, 64)
    outs = []
    for isa in ISAS:
        if isa != "portable":
            _native.set_isa(isa)
            outs.append(case.attend(q, [(0, 280, 20)]))
    assert all(torch.equal(out, outs[0]) for out in outs[1:])
