"""The runtime's edges: loading, errors, memory, fingerprint, closing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.runtimes.torch.conftest import Toy
from tests.runtimes.torch.toys import load_toy, prefill, save_toy, toy_tokens

from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.errors import ModelError, UnsupportedModel
from dormouse.domain.plan import Chunk, Plan
from dormouse.runtimes.base import Runtime
from dormouse.runtimes.fingerprint import DigestCache, model_fingerprint
from dormouse.runtimes.model_files import weight_files
from dormouse.runtimes.torch.reference import ReferenceKernels
from dormouse.runtimes.torch.runtime import TorchRuntime
from dormouse.runtimes.torch.selection import load_kernels

PAGES = (0, 1, 2)


def test_it_is_a_runtime_and_tells_its_numbers(toy: Callable[[str], Toy]) -> None:
    runtime: Runtime = load_toy(toy("llama")[0], KVFormat.K8V4, "bf16", num_pages=5)
    assert (runtime.name, runtime.num_pages, runtime.cache.block_size) == ("torch", 5, 16)
    spec = runtime.spec
    assert (spec.architecture, spec.num_layers, spec.num_kv_heads, spec.k_head_dim) == ("llama", 3, 2, 32)
    assert (spec.vocab_size, spec.context_length) == (97, 512)
    assert isinstance(runtime, TorchRuntime)
    assert runtime.arena_nbytes == 5 * runtime.cache.block_nbytes
    parameters = sum(parameter.numel() for parameter in toy("llama")[1].parameters())
    embedding = 97 * 64
    assert runtime.weights_nbytes == 2 * (parameters - embedding)


def test_logits_are_for_the_chunks_that_want_them(toy: Callable[[str], Toy]) -> None:
    runtime = load_toy(toy("llama")[0])
    wants = Chunk((1, 2, 3), 0, (0,), True)
    silent = Chunk((4, 5), 0, (1,), False)
    assert runtime.forward(Plan((silent, wants, silent))).shape == (1, 97)
    assert runtime.forward(Plan((silent,))).shape == (0, 97)
    assert runtime.forward(Plan(())).shape == (0, 97)


def test_nan_stays_in_its_own_sequence(toy: Callable[[str], Toy]) -> None:
    runtime = load_toy(toy("llama")[0])
    prefill(runtime, toy_tokens(16), (0,), [16])
    runtime.page_buffer(0)[:] = b"\xff" * runtime.cache.block_nbytes
    runtime.page_loaded(0)
    plan = Plan((Chunk((1,), 0, (1,), True), Chunk((1,), 16, (0, 2), True)))
    healthy, sick = runtime.forward(plan)
    assert np.isfinite(healthy).all()
    assert np.isnan(sick).any()


def test_pages_that_were_never_written_may_hold_anything(toy: Callable[[str], Toy]) -> None:
    runtime = load_toy(toy("llama")[0], KVFormat.BF16)
    clean = prefill(runtime, toy_tokens(20), PAGES, [20])[0]
    for page in range(runtime.num_pages):
        runtime.page_buffer(page)[:] = b"\xff" * runtime.cache.block_nbytes
    assert prefill(runtime, toy_tokens(20), PAGES, [20])[0].tobytes() == clean.tobytes()


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk((97,), 0, (0,), True),
        Chunk((-1,), 0, (0,), True),
        Chunk((1,), 0, (24,), True),
        Chunk((1,), 0, (-1,), True),
        Chunk((1,), 512, (0,) * 33, True),
        Chunk((1,), 16, (0,), True),
    ],
)
def test_a_plan_out_of_range_is_stopped(chunk: Chunk, toy: Callable[[str], Toy]) -> None:
    with pytest.raises(AssertionError):
        load_toy(toy("llama")[0]).forward(Plan((chunk,)))


def test_close_is_idempotent_and_final(toy: Callable[[str], Toy]) -> None:
    runtime = load_toy(toy("llama")[0])
    runtime.close()
    runtime.close()
    with pytest.raises(RuntimeError, match="closed"):
        runtime.forward(Plan((Chunk((1,), 0, (0,), True),)))


@pytest.mark.parametrize("changes", [{"device": "cuda"}, {"device": "tpu"}, {"dtype": "fp8"}])
def test_a_device_or_dtype_that_is_not_there(changes: dict[str, Any], toy: Callable[[str], Toy]) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ModelError, match=next(iter(changes.values()))):
        TorchRuntime.load(
            toy("llama")[0], name="toy", kv_format=KVFormat.Q8, block_size=16, arena_tokens=64, **changes
        )


def test_heads_that_no_group_divides_are_refused(tmp_path: Path) -> None:
    save_toy("llama", tmp_path, changes={"head_dim": 48})
    with pytest.raises(UnsupportedModel, match="48"):
        load_toy(tmp_path, KVFormat.K8V4)


def test_the_reference_is_what_is_left_without_native_kernels(toy: Callable[[str], Toy]) -> None:
    cache = load_toy(toy("llama")[0]).cache
    assert isinstance(load_kernels(cache, torch.device("cpu")), ReferenceKernels)


def copied(toy: Toy, folder: Path) -> Path:
    shutil.copytree(toy[0], folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def fingerprint(folder: Path, config: str = "config", cache: DigestCache | None = None) -> str:
    return model_fingerprint(folder, weight_files(folder), config, cache)


def test_the_fingerprint_is_of_content(toy: Callable[[str], Toy], tmp_path: Path) -> None:
    one, two = copied(toy("llama"), tmp_path / "one"), copied(toy("llama"), tmp_path / "two")
    first = fingerprint(one)
    assert fingerprint(two) == first
    assert fingerprint(one, "other config") != first
    (two / "tokenizer.json").write_text("{ }")
    assert fingerprint(two) != first


def test_a_changed_byte_changes_the_fingerprint_with_a_cache_too(
    toy: Callable[[str], Toy], tmp_path: Path
) -> None:
    folder = copied(toy("llama"), tmp_path / "model")
    kept = tmp_path / "cache" / "digests.json"
    first = fingerprint(folder, cache=DigestCache(kept))
    assert fingerprint(folder, cache=DigestCache(kept)) == first == fingerprint(folder)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(weights, ns=(1, 1))
    second = fingerprint(folder, cache=DigestCache(kept))
    assert second == fingerprint(folder) != first


@pytest.mark.parametrize("text", ["", "[1]", "not json"])
def test_a_damaged_digest_cache_is_started_anew(text: str, toy: Callable[[str], Toy], tmp_path: Path) -> None:
    folder = copied(toy("llama"), tmp_path / "model")
    (tmp_path / "digests.json").write_text(text)
    cached = fingerprint(folder, cache=DigestCache(tmp_path / "digests.json"))
    assert cached == fingerprint(folder)
