"""Lanes: sequences attended to together say what each says alone, whoever joins and leaves them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tests.runtimes.mlx.mlx_toys import chunk, close_to, load_mlx
from tests.runtimes.torch.toys import save_toy, toy_tokens

from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.plan import Plan
from dormouse.runtimes.base import Logits
from dormouse.runtimes.mlx import lanes
from dormouse.runtimes.mlx.lanes import Lane, Lanes, side_by_side
from dormouse.runtimes.mlx.runtime import MlxRuntime
from dormouse.runtimes.mlx.spans import Span, alike
from dormouse.runtimes.mlx.view import View

Pair = tuple[MlxRuntime, MlxRuntime]
TABLES = tuple(tuple(range(5 * n, 5 * n + 5)) for n in range(4))
TEXTS = tuple(toy_tokens(60, seed=n) for n in range(4))


@pytest.fixture(params=["llama", "gemma3"])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A toy of it, in a folder."""
    save_toy(request.param, tmp_path)
    return tmp_path


@pytest.fixture(params=[False, True], ids=["dense", "packed"])
def runtimes(request: pytest.FixtureRequest, family: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """Two that are alike; attention over dense views, as on a CPU, or over quantized ones, as on Metal."""
    monkeypatch.setattr("dormouse.runtimes.mlx.runtime._attends_packed", lambda: request.param)
    both = tuple(load_mlx(family, KVFormat.K8V4, num_pages=400) for _ in range(2))
    yield both[0], both[1]
    for runtime in both:
        runtime.close()


@pytest.fixture(params=[8, 256])
def growing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes that grow all the time, and ones that never do here."""
    monkeypatch.setattr(lanes, "_STEP", request.param)


@pytest.fixture
def adopted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of each lane that was copied."""
    lengths: list[int] = []
    adopt = Lanes.adopt

    def counted(lanes: Lanes, lane: Lane, length: int) -> Lane:
        lengths.append(length)
        return adopt(lanes, lane, length)

    monkeypatch.setattr(Lanes, "adopt", counted)
    return lengths


def step(runtime: MlxRuntime, spans: dict[int, tuple[int, int]]) -> Logits:
    """Compute `spans` of texts in one plan, with logits of each token."""
    plan = [chunk(TEXTS[n], *span, TABLES[n], span[1] - span[0]) for n, span in spans.items()]
    return runtime.forward(Plan(tuple(plan)))


@pytest.mark.usefixtures("growing")
def test_a_batch_that_changes_says_what_each_says_alone(runtimes: Pair) -> None:
    together, alone = runtimes
    for spans in (
        {0: (0, 20), 1: (0, 31), 2: (0, 17)},
        {0: (20, 21), 1: (31, 32)},
        {2: (17, 18), 1: (32, 33), 0: (21, 22)},  # one joins, in another order
        {1: (33, 37), 2: (18, 19), 0: (22, 24)},  # with guesses
        {0: (23, 24), 1: (35, 36)},  # of which not all were right; one pauses
        {3: (0, 40)},
        {0: (24, 25), 3: (40, 41), 1: (36, 37)},
        {0: (25, 26)},
        {3: (41, 42), 0: (26, 27), 2: (19, 20), 1: (37, 38)},
    ):
        got = step(together, spans)
        expected = [step(alone, {n: span}) for n, span in spans.items()]
        close_to(got, np.concatenate(expected), 2e-3)


def home_of(runtime: MlxRuntime, n: int) -> Lanes:
    """The lanes that a text's view was last in."""
    views = runtime._parts().views._by_page
    return next(view.lane.lanes for page, view in reversed(views.items()) if page in TABLES[n])


@pytest.mark.usefixtures("growing")
def test_the_same_step_gives_the_same_bits_wherever_its_lanes_are(
    runtimes: Pair,
) -> None:
    """In one of them the sequences have been in a batch with another one, which has gone, and were longer."""
    fresh, used = runtimes
    for runtime in runtimes:
        for n in range(4):
            step(runtime, {n: (0, 20 + n)})
    for ahead in range(9):
        step(used, {n: (20 + n + ahead, 21 + n + ahead) for n in (2, 0, 3, 1)})
    spans = {3: (23, 24), 0: (20, 21), 1: (21, 22)}
    np.testing.assert_array_equal(step(used, spans), step(fresh, spans))
    assert (len(home_of(used, 0)), len(home_of(fresh, 0))) == (4, 3)


def test_who_takes_the_place_of_another_is_the_only_one_copied(runtimes: Pair, adopted: list[int]) -> None:
    one, _ = runtimes
    for n in range(4):
        step(one, {n: (0, 20 + n)})
    step(one, {0: (20, 21), 1: (21, 22), 2: (22, 23)})
    assert sorted(adopted) == [20, 21, 22]
    step(one, {0: (21, 22), 2: (23, 24)})
    step(one, {0: (22, 23), 2: (24, 25), 3: (23, 24)})
    assert adopted[3:] == [23]
    step(one, {0: (23, 24), 2: (25, 29), 3: (24, 28)})
    step(one, {0: (24, 25), 2: (26, 27)})
    assert adopted[4:] == [], "who is among them already stays"


def test_a_sequence_that_goes_on_alone_makes_no_other_lane_longer(
    runtimes: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "_STEP", 8)
    one, _ = runtimes
    for n in range(4):
        step(one, {n: (0, 8)})
    step(one, dict.fromkeys(range(4), (8, 9)))
    together = home_of(one, 0).nbytes
    step(one, {0: (9, 60)})
    assert len(home_of(one, 0)) == 1
    assert home_of(one, 0).nbytes == 64 // 16 * together // 4
    for n in range(4):
        step(one, {n: (0, 15)})
    step(one, dict.fromkeys(range(4), (15, 16)))
    step(one, dict.fromkeys((0, 1), (16, 17)))
    step(one, dict.fromkeys((0, 1), (17, 24)))
    assert len(home_of(one, 0)) == 2, "two go where they may grow"


def test_what_another_left_behind_is_cleared() -> None:
    """A NaN has a part in the sum over values even where its weight is 0."""
    home = Lanes(2)
    left, gone = home.take(), home.take()
    part = mx.full((1, 2, 40, 8), mx.nan)
    for lane in (left, gone):
        lane.write(0, 0, (part,), (part,))
    other = Lanes(1).take()
    other.write(0, 0, (mx.ones((1, 2, 10, 8)),), (mx.ones((1, 2, 10, 8)),))
    del gone, lane
    moved = side_by_side([left, other], [40, 10], 41)
    assert [lane.lanes for lane in moved] == [home, home]
    (keys,), (values,) = moved[1].read(0, 0, 256)
    assert keys.shape == values.shape == (1, 2, 256, 8)
    assert float(keys.sum()) == float(values.sum()) == 2 * 10 * 8


def test_rows_of_unlike_length_are_not_padded_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dormouse.runtimes.mlx.spans._WORTH_NBYTES", 100)
    found = alike([Span(View(), start, 1) for start in (10, 12, 13, 200, 201, 999)], 10)
    assert [len(group) for group in found] == [3, 2, 1]
