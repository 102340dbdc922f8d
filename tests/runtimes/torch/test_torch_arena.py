"""Page bytes in, out and across."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.domain.errors import ModelError
from dormouse.runtimes.torch.arena import Arena

CPU = torch.device("cpu")


def spec(kv_format: KVFormat, head_dim: int = 32, layers: int = 3) -> CacheSpec:
    return CacheSpec.for_heads(
        kv_format, 16, num_layers=layers, num_kv_heads=3, k_head_dim=head_dim, v_head_dim=head_dim * 2
    )


def filled(cache: CacheSpec) -> tuple[Arena, bytes]:
    arena = Arena(cache, 4, CPU)
    payload = np.random.default_rng(0).integers(1, 256, cache.block_nbytes, dtype=np.uint8).tobytes()
    arena.page_buffer(2)[:] = payload
    arena.page_loaded(2)
    return arena, payload


def rows_of(cache: CacheSpec, payload: bytes, start: int, end: int) -> list[bytes]:
    """The bytes of some tokens in every section, from the layout's description alone."""
    found = []
    for section in cache.sections:
        if not section.name.startswith("padding"):
            flat = np.frombuffer(payload, np.uint8, section.nbytes, section.offset)
            found.append(flat.reshape(*section.shape[:2], -1)[:, start:end].tobytes())
    return found


@pytest.mark.parametrize("kv_format", list(KVFormat))
@pytest.mark.parametrize("count", [0, 1, 9, 16])
def test_read_page_gives_the_first_rows_and_zeros(kv_format: KVFormat, count: int) -> None:
    cache = spec(kv_format)
    arena, payload = filled(cache)
    read = arena.read_page(2, count)
    assert len(read) == cache.block_nbytes
    assert rows_of(cache, read, 0, count) == rows_of(cache, payload, 0, count)
    assert not any(any(rows) for rows in rows_of(cache, read, count, 16))
    for section in cache.sections:
        if section.name.startswith("padding"):
            assert not any(read[section.offset : section.offset + section.nbytes])


@pytest.mark.parametrize("kv_format", list(KVFormat))
def test_copy_page_copies_the_first_rows_only(kv_format: KVFormat) -> None:
    cache = spec(kv_format)
    arena, payload = filled(cache)
    arena.page_buffer(0)[:] = bytes(cache.block_nbytes)
    arena.copy_page(2, 0, 5)
    copied = arena.read_page(0, 16)
    assert rows_of(cache, copied, 0, 5) == rows_of(cache, payload, 0, 5)
    assert not any(any(rows) for rows in rows_of(cache, copied, 5, 16))
    assert arena.read_page(2, 16) == arena.read_page(2, 16)
    assert rows_of(cache, arena.read_page(2, 16), 0, 16) == rows_of(cache, payload, 0, 16)


def test_a_page_buffer_is_the_page_itself() -> None:
    arena, payload = filled(spec(KVFormat.K8V4))
    buffer = arena.page_buffer(2)
    assert (buffer.nbytes, buffer.readonly, buffer.format) == (arena.cache.block_nbytes, False, "B")
    assert bytes(buffer) == payload
    assert arena.memory.data_ptr() % 64 == 0
    assert np.frombuffer(buffer, np.uint8).ctypes.data == arena.memory[2].data_ptr()


@pytest.mark.parametrize("page", [-1, 4])
def test_a_page_out_of_range_is_never_another_page(page: int) -> None:
    arena, _ = filled(spec(KVFormat.Q8))
    for use in (arena.page_buffer, lambda page: arena.read_page(page, 1)):
        with pytest.raises(AssertionError):
            use(page)


def test_an_arena_that_cannot_be_had_is_a_typed_error() -> None:
    with pytest.raises(ModelError, match="GiB"):
        Arena(spec(KVFormat.F32), 2**40, CPU)


def test_other_devices_stage_and_upload() -> None:
    arena = Arena(spec(KVFormat.Q8), 4, torch.device("meta"))
    buffer = arena.page_buffer(1)
    buffer[:] = bytes(len(buffer))
    arena.page_loaded(1)
    arena.page_loaded(1)
