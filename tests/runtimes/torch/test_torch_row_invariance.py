"""KV bytes and logits depend on a token's past alone, to the bit: sleep is invisible because of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.runtimes.torch.conftest import Toy
from tests.runtimes.torch.toys import chunk_of, load_toy, prefill, save_toy, stored, toy_tokens

from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.plan import Plan
from dormouse.runtimes.torch.runtime import TorchRuntime

LENGTH = 75
PAGES = (5, 3, 11, 0, 7)
DTYPES = ("fp32", "bf16")


def result(
    runtime: TorchRuntime, tokens: Sequence[int], pages: Sequence[int], sizes: Sequence[int]
) -> object:
    logits = prefill(runtime, tokens, pages, sizes)[-1]
    return stored(runtime, pages, len(tokens)), logits.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "kv_format"), [*(("llama", kv_format) for kv_format in KVFormat), ("gemma3", KVFormat.K8V4)]
)
def test_any_chunking_gives_the_same_bits(
    name: str, kv_format: KVFormat, dtype: str, toy: Callable[[str], Toy]
) -> None:
    runtime = load_toy(toy(name)[0], kv_format, dtype)
    tokens = toy_tokens(LENGTH)
    whole = result(runtime, tokens, PAGES, [LENGTH])
    for size in (1, 3, 16, 17, 64):
        assert result(runtime, tokens, PAGES[::-1], [size]) == whole, size


@pytest.mark.usefixtures("any_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama-all-biases", "smollm3", "qwen2-sliding", "qwen3"])
def test_other_families_decode_what_they_prefill(name: str, dtype: str, toy: Callable[[str], Toy]) -> None:
    runtime = load_toy(toy(name)[0], KVFormat.K8V4, dtype)
    tokens = toy_tokens(LENGTH)
    whole = result(runtime, tokens, PAGES, [LENGTH])
    assert result(runtime, tokens, PAGES, [50, 7, 1]) == whole


@pytest.mark.usefixtures("any_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_company_changes_nothing(name: str, dtype: str, toy: Callable[[str], Toy]) -> None:
    runtime = load_toy(toy(name)[0], KVFormat.K8V4, dtype)
    lengths, starts = (LENGTH, 20, 49, 1, 33), (74, 19, 16, 0, 0)
    sequences = [toy_tokens(length, seed) for seed, length in enumerate(lengths)]
    tables = [tuple(range(first, first + 5)) for first in (0, 5, 7, 11, 12)]
    alone = [result(runtime, *pair, [LENGTH]) for pair in zip(sequences, tables, strict=True)]
    chunks = []
    for tokens, pages, start in zip(sequences, tables, starts, strict=True):
        prefill(runtime, tokens[:start], pages, [LENGTH])
        chunks.append(chunk_of(tokens, start, len(tokens), pages))
    logits = runtime.forward(Plan(tuple(chunks)))
    for row, tokens, pages, expected in zip(logits, sequences, tables, alone, strict=True):
        assert (stored(runtime, pages, len(tokens)), row.tobytes()) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=6), guest=st.integers(1, 40))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_cuts_beside_a_guest(
    dtype: str, cuts: list[int], guest: int, toy: Callable[[str], Toy]
) -> None:
    runtime = load_toy(toy("qwen3")[0], KVFormat.Q4, dtype)
    tokens = toy_tokens(sum(cuts))
    pages, guest_pages = tuple(range(12)), tuple(range(12, 24))
    whole = result(runtime, tokens, pages, [len(tokens)])
    other = toy_tokens(guest, seed=9)
    end = 0
    for cut in cuts:
        start, end = end, end + cut
        plan = Plan((chunk_of(other, 0, guest, guest_pages), chunk_of(tokens, start, end, pages)))
        logits = runtime.forward(plan)
    assert (stored(runtime, pages, len(tokens)), logits[1].tobytes()) == whole


@pytest.mark.usefixtures("any_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_widths_and_many_rows(dtype: str, tmp_path: Path) -> None:
    """The widths of SmolLM2-135M, where torch splits the work over threads and BLAS blocks it."""
    wide = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 1,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    }
    save_toy("llama", tmp_path, changes=wide)
    runtime = TorchRuntime.load(
        tmp_path,
        name="wide",
        kv_format=KVFormat.K8V4,
        block_size=128,
        arena_tokens=640,
        dtype=dtype,
        threads=2,
    )
    tokens, pages = toy_tokens(511), (2, 0, 1, 3)
    whole = result(runtime, tokens, pages, [511])
    for sizes in ([510, 1], [77, 300, 134], [1, 255, 3, 5, 247]):
        assert result(runtime, tokens, pages, sizes) == whole, sizes


def test_a_copied_page_continues_as_the_original(toy: Callable[[str], Toy]) -> None:
    runtime = load_toy(toy("llama")[0], KVFormat.K8V4, "bf16")
    tokens = toy_tokens(40)
    whole = prefill(runtime, tokens, PAGES, [40])[0]
    runtime.copy_page(PAGES[1], 20, 9)
    fork = (PAGES[0], 20, 21)
    logits = runtime.forward(Plan((chunk_of(tokens, 25, 40, fork),)))[0]
    np.testing.assert_array_equal(logits, whole)


def test_a_page_that_went_through_bytes_continues_as_the_original(toy: Callable[[str], Toy]) -> None:
    folder = toy("llama")[0]
    runtime, woken = load_toy(folder, KVFormat.K8V4, "bf16"), load_toy(folder, KVFormat.K8V4, "bf16")
    tokens = toy_tokens(40)
    prefill(runtime, tokens[:-1], PAGES, [64])
    for page, target, count in zip(PAGES, (9, 8, 7), (16, 16, 7), strict=False):
        woken.page_buffer(target)[:] = runtime.read_page(page, count)
        woken.page_loaded(target)
    slept = woken.forward(Plan((chunk_of(tokens, 39, 40, (9, 8, 7)),)))
    awake = runtime.forward(Plan((chunk_of(tokens, 39, 40, PAGES),)))
    np.testing.assert_array_equal(slept, awake)
