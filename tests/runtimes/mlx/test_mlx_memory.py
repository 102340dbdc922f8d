"""MLX's own counters over many requests, and its threads."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tests.runtimes.mlx.mlx_toys import chunk, load_mlx, our_logits
from tests.runtimes.torch.toys import save_toy, toy_tokens

from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.plan import Plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    save_toy("llama", folder)
    return folder


def test_300_requests_leave_nothing_behind(folder: Path) -> None:
    """By different sequences in the same pages; some wake, some are cut off in the middle."""
    runtime = load_mlx(folder, KVFormat.K8V4, num_pages=16)
    random = np.random.default_rng(0)
    active = []
    for request in range(300):
        tokens = tuple(random.integers(0, 97, 40).tolist())
        table = tuple(int(page) for page in random.permutation(16)[:3])
        start = 16 if request % 3 == 0 else 0  # what it finds there is as good as what was read from disk
        if start:
            runtime.page_loaded(table[0])
        runtime.forward(Plan((chunk(tokens, start, 33, table),)))
        for position in range(33, 33 + request % 7):
            runtime.forward(Plan((chunk(tokens, position, position + 1, table),)))
        if request % 50 == 49:
            gc.collect()
            active.append(mx.get_active_memory())
            assert len(runtime._parts().views) <= 16
    assert max(active[1:]) <= active[0] + 2 * runtime.cache.block_nbytes * 16
    runtime.close()


def test_closing_gives_memory_back(folder: Path) -> None:
    gc.collect()
    before = mx.get_active_memory()
    runtime = load_mlx(folder)
    our_logits(runtime, toy_tokens(40), (40,), (0, 1, 2))
    assert mx.get_active_memory() > before
    runtime.close()
    del runtime
    gc.collect()
    assert mx.get_active_memory() <= before


def test_it_is_loaded_in_one_thread_and_runs_in_another(folder: Path) -> None:
    """As a server does it; the thread that loaded has ended by then."""
    text = toy_tokens(40)
    with ThreadPoolExecutor(1) as loading:
        runtime = loading.submit(load_mlx, folder, KVFormat.K8V4).result()
    with ThreadPoolExecutor(1) as engine:
        got = engine.submit(our_logits, runtime, text, (20, 1), (0, 1, 2)).result()
    again = load_mlx(folder, KVFormat.K8V4)
    np.testing.assert_array_equal(got, our_logits(again, text, (20, 1), (5, 3, 4)))
    closing = threading.Thread(target=runtime.close)
    closing.start()
    closing.join(10)
    again.close()
