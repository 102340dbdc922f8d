"""Views: found by pages, never stale, dropped within their budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.runtimes.mlx.mlx_toys import chunk, load_mlx, our_logits
from tests.runtimes.torch.toys import save_toy, toy_tokens

from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.plan import Plan
from dormouse.runtimes.mlx.runtime import MlxRuntime
from dormouse.runtimes.mlx.view import View

TEXT = toy_tokens(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    save_toy("llama", folder)
    return folder


@pytest.fixture
def runtime(folder: Path) -> Iterator[MlxRuntime]:
    runtime = load_mlx(folder, KVFormat.K8V4, num_pages=400)
    yield runtime
    runtime.close()


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of each view that was made out of pages."""
    lengths: list[int] = []
    gather = View.gather

    def counted(*args: object) -> View:
        lengths.append(args[-1])  # type: ignore[arg-type]
        return gather(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(View, "gather", counted)
    return lengths


def test_a_running_sequence_keeps_its_view(runtime: MlxRuntime, gathered: list[int]) -> None:
    our_logits(runtime, TEXT, (20, 1), (3, 1, 2, 0))
    assert not any(gathered)


def test_a_reply_goes_on_in_a_copy_of_its_last_page(runtime: MlxRuntime, gathered: list[int]) -> None:
    our_logits(runtime, TEXT[:20], (20,), (3, 1))
    runtime.copy_page(1, 5, 4)
    runtime.forward(Plan((chunk(TEXT, 20, 21, (3, 5)),)))
    assert not any(gathered)


def test_waking_and_forking_read_the_pages_once(runtime: MlxRuntime, gathered: list[int]) -> None:
    our_logits(runtime, TEXT[:32], (32,), (3, 1))
    for page, target in ((3, 7), (1, 8)):
        runtime.page_buffer(target)[:] = runtime.read_page(page, 16)
        runtime.page_loaded(target)
    our_logits(runtime, TEXT[:32], (32,), (3, 1))
    for start in (32, 33, 34):
        runtime.forward(Plan((chunk(TEXT, start, start + 1, (7, 8, 9)),)))
        runtime.forward(Plan((chunk(TEXT, start, start + 1, (3, 1, 2)),)))
    assert [length for length in gathered if length] == [32]


def test_dropped_views_come_back_from_pages(folder: Path) -> None:
    """With room for no idle view each step of two sequences in turn reads the pages; words stay the same."""
    kept, dropping = load_mlx(folder, KVFormat.K8V4), load_mlx(folder, KVFormat.K8V4)
    dropping._parts().views._budget_nbytes = 0
    tables = ((0, 1, 2), (3, 4, 5))
    for start, end in ((0, 20), (20, 21), (21, 22), (22, 40)):
        for table, text in zip(tables, (TEXT, TEXT[::-1]), strict=True):
            plan = Plan((chunk(text, start, end, table),))
            np.testing.assert_array_equal(dropping.forward(plan), kept.forward(plan))
            assert len(dropping._parts().views) == 1
    kept.close()
    dropping.close()


def test_views_of_a_plan_are_never_dropped(folder: Path) -> None:
    runtime = load_mlx(folder, KVFormat.K8V4)
    runtime._parts().views._budget_nbytes = 0
    tables = ((0, 1), (3, 4), (6, 7))
    runtime.forward(Plan(tuple(chunk(TEXT, 0, 9, table) for table in tables)))
    assert len(runtime._parts().views) == 3
    assert runtime.working_nbytes > 0
    runtime.close()
