"""The power is cut at every step that the store takes on disk, and what it could leave is opened.

`make faults` does it at every step in every way; without `--every` it is a sample.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from tests.crash.disk_log import Disk, Keep, LoggingOps, Step, drawn, everything, nothing_unsynced
from tests.crash.story import QUOTA, STORY, Desk, State
from tests.store.kit import assert_loads, links_of, nbytes_below, ram_folder

BEGINS, ENDS = "begins", "ends"
SAMPLE = 120
DRAWS = 4
ROOMY = 4 * QUOTA
"""What is opened evicts nothing: a block that is not there is lost."""


@dataclass(frozen=True)
class Life:
    """The steps of a story, and what is promised before and after each of its chapters."""

    steps: list[Step]
    states: list[State]


@pytest.fixture(scope="module")
def life() -> Iterator[Life]:
    with ram_folder() as base:
        folder = base / "data"
        ops = LoggingOps(folder)
        desk = Desk.open(folder, ops)
        states = [State.of(desk)]
        for number, chapter in enumerate(STORY):
            ops.mark(BEGINS, str(number))
            chapter(desk)
            assert desk.store.flush()
            states.append(State.of(desk))
            ops.mark(ENDS, str(number))
        assert desk.store.stats().counts["evictions"] > 0, "the story has no evictions"
        desk.store.close()
        yield Life(ops.steps, states)


def test_the_log_is_what_happened(life: Life) -> None:
    """At its end, and with nothing lost, the log leaves the state that was seen."""
    disk = Disk()
    for step in life.steps:
        disk.do(step)
    assert {"create", "write", "sync", "rename", "unlink", "sync_folder", "truncate"} <= {
        s.kind for s in life.steps
    }
    assert check(disk, everything(), life.states[-1], life.states[-1]) == life.states[-1]


def test_every_power_cut_leaves_what_was_promised(life: Life, request: pytest.FixtureRequest) -> None:
    every = request.config.getoption("--every", default=False)
    num_steps = len(life.steps)
    points = list(range(num_steps + 1))
    if not every:
        points = sorted(random.Random(num_steps).sample(points, SAMPLE))
    disk = Disk()
    done = 0
    before = after = life.states[0]
    for number in points:
        for step in life.steps[done:number]:
            disk.do(step)
            if step.kind == BEGINS:
                after = life.states[int(step.path) + 1]
            elif step.kind == ENDS:
                before = after
        done = number
        ways = [nothing_unsynced(), everything(), *(drawn(number * DRAWS + n) for n in range(DRAWS))]
        for way in ways if every else [ways[0], ways[2 + number % DRAWS]]:
            check(disk, way, before, after)


def check(disk: Disk, keep: Keep, before: State, after: State) -> State:
    """Open what a cut leaves between two states; all of it is as in one of them."""
    with ram_folder() as base:
        folder = base / "data"
        folder.mkdir(mode=0o700)
        disk.leave(folder, keep)
        desk = Desk.open(folder, quota_nbytes=ROOMY)
        store = desk.store
        store.check()
        assert store.verify().is_clean
        assert store.stats().notes == ()
        assert store.health() == ()
        assert not list(folder.rglob("*.tmp"))
        assert store.stats().nbytes == nbytes_below(folder)
        found = State.of(desk)
        for part in ("agents", "checkpoints", "documents", "replies"):
            assert_between(part, getattr(found, part), getattr(before, part), getattr(after, part))
        assert before.stored & after.stored <= found.stored, "a block is lost"
        assert found.stored <= before.stored | after.stored, "what was removed is back"
        desk.reply("next", [9] * 40)
        assert_loads(store, links_of([9] * 40))
        store.close()
        again = Desk.open(folder, quota_nbytes=ROOMY)
        assert again.store.verify().is_clean
        assert {name: h for name, h in State.of(again).agents.items() if name != "next"} == found.agents
        again.store.close()
        return found


def assert_between(
    part: str, found: Mapping[Any, Any], before: Mapping[Any, Any], after: Mapping[Any, Any]
) -> None:
    """Each thing is as it was before, or as it is after."""
    for name in found.keys() | before.keys() | after.keys():
        assert found.get(name) in (before.get(name), after.get(name)), (part, name)
