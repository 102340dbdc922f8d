"""Memory made ready ahead of its use: as much as is wanted, with its content."""

from __future__ import annotations

import gc
import mmap
import sys
import threading
import time
from collections.abc import Callable

import psutil
import pytest
import torch

from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.runtimes.torch import headroom
from dormouse.runtimes.torch.arena import Arena
from dormouse.runtimes.torch.headroom import Headroom

MIB = 1 << 20
PATIENCE_S = 30.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux maps memory ahead")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.001)


def arena(nbytes: int) -> Arena:
    shape = {"num_layers": 2, "num_kv_heads": 2, "k_head_dim": 64, "v_head_dim": 64}
    cache = CacheSpec.for_heads(KVFormat.F32, 128, **shape)
    return Arena(cache, nbytes // cache.block_nbytes, torch.device("cpu"))


def test_memory_is_mapped_a_piece_ahead_of_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom, "AHEAD_NBYTES", 64 * MIB)
    process = psutil.Process()
    before = process.memory_info().rss
    pages = arena(512 * MIB)
    block_nbytes = pages.cache.block_nbytes
    until(lambda: process.memory_info().rss - before > 60 * MIB)
    assert process.memory_info().rss - before < 100 * MIB
    pages.page_buffer(128 * MIB // block_nbytes)
    until(lambda: process.memory_info().rss - before > 180 * MIB)
    assert process.memory_info().rss - before < 230 * MIB
    pages.close()


def test_what_is_written_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom, "AHEAD_NBYTES", MIB)
    memory = torch.arange(48 * MIB // 8, dtype=torch.int64).view(torch.uint8)
    before = memory.clone()
    ready = Headroom(memory)
    ready.reach(memory.nbytes)
    until(lambda: ready.mapped_nbytes > memory.nbytes - mmap.PAGESIZE)
    assert torch.equal(memory, before)
    ready.close()
    ready.close()


def test_an_arena_that_is_dropped_leaves_no_thread() -> None:
    names = [thread.name for thread in threading.enumerate()]
    pages = arena(8 * MIB)
    del pages
    gc.collect()
    assert [thread.name for thread in threading.enumerate()].count("headroom") == names.count("headroom")


def test_memory_of_other_devices_is_left_alone() -> None:
    ready = Headroom(torch.empty(MIB, dtype=torch.uint8, device="meta"))
    ready.reach(MIB)
    assert ready.mapped_nbytes == 0
    ready.close()
