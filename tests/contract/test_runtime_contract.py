"""What every runtime promises, held to each of them: one suite, run on the fake, on torch and on mlx.

Where a runtime is not row invariant, what was computed in other steps is compared within a tolerance; what
was computed in the same steps must be equal to the bit for every runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.runtimes.torch.toys import save_toy

from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.plan import Chunk, Plan
from dormouse.runtimes.base import Logits, Runtime
from dormouse.runtimes.fake import FakeRuntime
from dormouse.runtimes.torch.runtime import TorchRuntime

BLOCK = 16
NUM_PAGES = 12
PROMPT = tuple((7 * i + 3) % 89 for i in range(53))
TABLE = (5, 2, 9, 0)
TOLERANCE = 0.05
"""Of the largest logit: what rounding does to the toy in bf16 and 4 bits."""


@pytest.fixture(scope="session")
def toy_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy-llama")
    save_toy("llama", folder, changes={"intermediate_size": 128})  # so that its weights can be quantized
    return folder


@pytest.fixture(
    params=[
        "fake",
        "torch-bf16-k8v4",
        "torch-fp32-q8",
        "torch-bf16-bf16",
        "torch-bf16-k8v4-no-native",
        "torch-bf16-k8v4-int8",
        "torch-fp32-q4-int4",
        "mlx-fp32-k8v4",
        "mlx-bf16-k8v4",
        "mlx-fp32-q8",
        "mlx-fp32-bf16",
        "mlx-fp32-q4",
    ]
)
def make(
    request: pytest.FixtureRequest, toy_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Runtime]:
    name, *rest = request.param.split("-", 3)
    if name == "fake":
        return lambda: FakeRuntime(NUM_PAGES, block_size=BLOCK)
    dtype, kv_format, *path = rest
    if name == "mlx":
        return lambda: load_mlx(toy_llama, dtype, KVFormat(kv_format))
    if "no-native" in path:
        monkeypatch.setenv("DORMOUSE_NO_NATIVE", "1")
    weights = path[0] if path and "no-native" not in path else "bf16"
    if weights != "bf16":
        pytest.importorskip("dormouse._native", reason="quantized weights need the native module")
    return lambda: TorchRuntime.load(
        toy_llama,
        name="toy",
        kv_format=KVFormat(kv_format),
        block_size=BLOCK,
        arena_tokens=NUM_PAGES * BLOCK,
        dtype=dtype,
        weights=weights,
    )


def load_mlx(folder: Path, dtype: str, kv_format: KVFormat) -> Runtime:
    pytest.importorskip("mlx.core", reason="the extra mlx is not installed")
    from dormouse.runtimes.mlx.runtime import MlxRuntime

    return MlxRuntime.load(
        folder,
        name="toy",
        kv_format=kv_format,
        block_size=BLOCK,
        arena_tokens=NUM_PAGES * BLOCK,
        dtype=dtype,
    )


@pytest.fixture
def runtime(make: Callable[[], Runtime]) -> Iterator[Runtime]:
    runtime = make()
    yield runtime
    runtime.close()


def run(runtime: Runtime, tokens: tuple[int, ...], start: int, table: tuple[int, ...]) -> Logits:
    """Logits after `tokens`, which stand behind `start` computed ones."""
    pages = table[: -(-(start + len(tokens)) // BLOCK)]
    logits: Logits = runtime.forward(Plan((Chunk(tokens, start, pages, 1),)))[0].copy()
    return logits


def assert_same(runtime: Runtime, got: Logits, expected: Logits) -> None:
    """Logits of one past that was computed in different steps."""
    if runtime.row_invariant:
        np.testing.assert_array_equal(got, expected)
    else:
        allowed = TOLERANCE * float(np.abs(expected).max())
        np.testing.assert_allclose(got, expected, rtol=0, atol=allowed)


def assert_same_bytes(runtime: Runtime, got: bytes, expected: bytes) -> None:
    """K and V of one past that were computed in different steps."""
    if runtime.row_invariant:
        assert got == expected, "the KV is the same to the bit"
    else:
        differ = np.frombuffer(got, np.uint8) != np.frombuffer(expected, np.uint8)
        assert differ.mean() < 0.5, "most of the KV is the same to the bit"


def fill(runtime: Runtime, page: int, payload: bytes) -> None:
    runtime.page_buffer(page)[:] = payload
    runtime.page_loaded(page)


def test_spec_and_cache_agree(runtime: Runtime) -> None:
    assert runtime.cache == runtime.spec.cache_spec(runtime.cache.format, BLOCK)
    assert runtime.num_pages == NUM_PAGES
    assert len(runtime.page_buffer(0)) == runtime.cache.block_nbytes
    assert len(runtime.read_page(0, 3)) == runtime.cache.block_nbytes


def test_logits_are_one_row_per_wanted_token(runtime: Runtime) -> None:
    wanting = Chunk(PROMPT[:5], 0, (1,), 2)
    silent = Chunk(PROMPT[:5], 0, (2,), 0)
    logits = runtime.forward(Plan((wanting, silent, Chunk(PROMPT[:3], 0, (3,), 1))))
    assert logits.shape == (3, runtime.spec.vocab_size)
    assert logits.dtype == np.float32
    logits[:] = 0  # the caller's to change
    assert runtime.forward(Plan((silent,))).shape == (0, runtime.spec.vocab_size)


def test_logits_of_inner_tokens_are_those_of_shorter_chunks(runtime: Runtime) -> None:
    rows = runtime.forward(Plan((Chunk(PROMPT[:9], 0, (1,), 9),)))
    for length in (1, 4, 9):
        alone = run(runtime, PROMPT[:length], 0, (2,))
        assert_same(runtime, rows[length - 1], alone)


@pytest.mark.parametrize("cuts", [(1,), (16,), (3, 17, 40), (52,), tuple(range(1, 53))])
def test_rows_do_not_depend_on_the_chunking(make: Callable[[], Runtime], cuts: tuple[int, ...]) -> None:
    whole, cut = make(), make()
    expected = run(whole, PROMPT, 0, TABLE)
    borders = (0, *cuts, len(PROMPT))
    for start, end in pairwise(borders):
        got = run(cut, PROMPT[start:end], start, TABLE)
    assert_same(cut, got, expected)
    for index, page in enumerate(TABLE):
        rows = min(BLOCK, len(PROMPT) - index * BLOCK)
        assert_same_bytes(cut, cut.read_page(page, rows), whole.read_page(page, rows))
    whole.close()
    cut.close()


def test_rows_do_not_depend_on_the_batch(runtime: Runtime) -> None:
    expected = run(runtime, PROMPT[:30], 0, (0, 1))
    others = [Chunk(PROMPT[5:12], 0, (4,), 1), Chunk(PROMPT[::-1][:20], 0, (6, 7), 1)]
    mixed = runtime.forward(Plan((others[0], Chunk(PROMPT[:30], 0, (2, 3), 1), others[1])))
    assert_same(runtime, mixed[1], expected)
    decode_alone = run(runtime, PROMPT[30:31], 30, (0, 1))
    batch = Plan((Chunk(PROMPT[12:13], 7, (4,), 1), Chunk(PROMPT[30:31], 30, (2, 3), 1)))
    assert_same(runtime, runtime.forward(batch)[1], decode_alone)


def test_pages_travel_as_bytes(make: Callable[[], Runtime]) -> None:
    """What sleep is: read a page, drop it, fill another one, in another process for all it knows."""
    before, after = make(), make()
    run(before, PROMPT[:-1], 0, TABLE)
    other = (7, 1, 3, 11)
    for page, target, used in zip(TABLE, other, (16, 16, 16, 4), strict=True):
        fill(after, target, before.read_page(page, used))
    expected = run(before, PROMPT[-1:], len(PROMPT) - 1, TABLE)
    np.testing.assert_array_equal(run(after, PROMPT[-1:], len(PROMPT) - 1, other), expected)
    before.close()
    after.close()


def test_unused_rows_leave_as_zeros(runtime: Runtime) -> None:
    run(runtime, PROMPT[:16], 0, (4,))
    full = runtime.read_page(4, 16)
    run(runtime, PROMPT[:5], 0, (6,))
    fill(runtime, 8, full)
    run(runtime, PROMPT[:5], 0, (8,))
    assert runtime.read_page(8, 5) == runtime.read_page(6, 5), "rows of the page's past do not leak"
    assert not any(runtime.read_page(8, 0))


def test_copied_heads_go_on_alike(runtime: Runtime) -> None:
    run(runtime, PROMPT[:16], 0, (4,))
    runtime.copy_page(4, 6, 11)
    assert runtime.read_page(6, 11) == runtime.read_page(4, 11)
    assert_same(runtime, run(runtime, PROMPT[11:14], 11, (6,)), run(runtime, PROMPT[:14], 0, (9,)))
    assert runtime.read_page(4, 16) == runtime.read_page(4, 16)


def test_a_wrong_page_changes_the_logits(runtime: Runtime) -> None:
    expected = run(runtime, PROMPT[:20], 0, (0, 1))
    run(runtime, PROMPT[1:17], 0, (3,))
    assert not np.array_equal(run(runtime, PROMPT[16:20], 16, (3, 1)), expected)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6))
def test_any_interleaving_of_two_sequences_is_each_alone(
    runtime: Runtime, cuts: list[tuple[int, int]]
) -> None:
    texts = (PROMPT[:33], PROMPT[::-1][:27])
    expected = [run(runtime, texts[0], 0, (6, 7, 8)), run(runtime, texts[1], 0, (9, 10, 11))]
    tables = ((0, 1, 2), (3, 4, 5))
    done = [0, 0]
    last: list[Logits | None] = [None, None]
    for sizes in [*cuts, (33, 27)]:
        step = {}
        for who, size in enumerate(sizes):
            start, end = done[who], min(done[who] + size, len(texts[who]))
            if end > start:
                pages = tables[who][: -(-end // BLOCK)]
                step[who] = Chunk(texts[who][start:end], start, pages, 1)
                done[who] = end
        if step:
            for who, row in zip(step, runtime.forward(Plan(tuple(step.values()))), strict=True):
                last[who] = row
    for row, wanted in zip(last, expected, strict=True):
        assert row is not None
        assert_same(runtime, row, wanted)


def test_sleep_between_any_two_steps_changes_nothing(make: Callable[[], Runtime]) -> None:
    """To the bit on every runtime: only the pages went away and came back elsewhere."""
    awake, asleep = make(), make()
    tables = (TABLE, (7, 1, 3, 11), (4, 6, 8, 10))
    borders = (0, 5, 22, 23, 24, 48, 53)
    for turn, (start, end) in enumerate(pairwise(borders)):
        here, there = tables[turn % 3], tables[(turn + 1) % 3]
        expected = run(awake, PROMPT[start:end], start, TABLE)
        np.testing.assert_array_equal(run(asleep, PROMPT[start:end], start, here), expected)
        for index in range(-(-end // BLOCK)):
            payload = asleep.read_page(here[index], min(BLOCK, end - index * BLOCK))
            assert payload == awake.read_page(TABLE[index], min(BLOCK, end - index * BLOCK))
            fill(asleep, there[index], payload)
    awake.close()
    asleep.close()


def test_what_a_page_was_loaded_with_last_is_what_counts(runtime: Runtime) -> None:
    """Under the eyes of a sequence its page becomes another one."""
    run(runtime, PROMPT[:20], 0, (0, 1))
    run(runtime, PROMPT[1:17], 0, (3,))
    run(runtime, PROMPT[16:19], 16, (3, 4))
    expected = run(runtime, PROMPT[19:20], 19, (3, 4))
    fill(runtime, 0, runtime.read_page(3, BLOCK))
    fill(runtime, 1, runtime.read_page(4, 3))
    np.testing.assert_array_equal(run(runtime, PROMPT[19:20], 19, (0, 1)), expected)


def test_a_sequence_goes_back_and_says_something_else(runtime: Runtime) -> None:
    """What a wrong guess was written for is written over."""
    run(runtime, PROMPT[:21], 0, (0, 1))
    other = run(runtime, PROMPT[30:35], 14, (0, 1))
    run(runtime, PROMPT[:14], 0, (2,))
    assert_same(runtime, other, run(runtime, PROMPT[30:35], 14, (2, 3)))


@pytest.mark.parametrize("head", [1, 11, 16])
def test_a_fork_and_its_origin_go_on_apart(runtime: Runtime, head: int) -> None:
    run(runtime, PROMPT[:16], 0, (0,))
    if head < BLOCK:
        runtime.copy_page(0, 1, head)
    tables = ((0, 2), (0, 3)) if head == BLOCK else ((0, 2), (1, 3))
    texts = (PROMPT[16:26], PROMPT[40:50])
    starts = (16, head)
    done = [0, 0]
    for turn in (0, 1, 1, 0, 1, 0):
        start = starts[turn] + done[turn]
        token = texts[turn][done[turn] : done[turn] + 1]
        got = run(runtime, token, start, tables[turn])
        past = PROMPT[: starts[turn]] + texts[turn][: done[turn]]
        done[turn] += 1
        assert_same(runtime, got, run(runtime, past + token, 0, (8, 9)))


def test_a_copied_page_may_be_loaded_with_something_else(runtime: Runtime) -> None:
    run(runtime, PROMPT[:12], 0, (0,))
    run(runtime, PROMPT[20:32], 0, (1,))
    runtime.copy_page(0, 2, 12)
    fill(runtime, 2, runtime.read_page(1, 12))
    expected = run(runtime, PROMPT[12:13], 12, (1,))
    np.testing.assert_array_equal(run(runtime, PROMPT[12:13], 12, (2,)), expected)


def test_close_can_be_called_twice(runtime: Runtime) -> None:
    runtime.close()
    runtime.close()
