"""The disk fails at every step that the store takes on it: serving goes on, health and log say why, saving
resumes by itself, and nothing that was told is lost.

`make faults` does it at every step with every fault; without `--every` it is a sample.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.fault_points import FAULTS, FailingDisk, Fault
from tests.crash.story import STORY, TENANT, Chapter, Desk, State
from tests.store.kit import nbytes_below, ram_folder

from dormouse.domain.errors import DeadlineExceeded, StoreError

pytestmark = pytest.mark.timeout(600)

SAMPLE = 40
MOST_TRIES = 200
SILENT = frozenset({"wipe", "fold"})
"""Steps whose failure takes nothing from anybody: it is logged as a warning, and tried again."""


@pytest.fixture(scope="module")
def untroubled() -> tuple[int, list[State]]:
    """How many steps the story takes, and what is promised after each chapter."""
    with ram_folder() as base:
        disk = FailingDisk(FAULTS[0])
        desk = Desk.open(base / "data", disk)
        first = disk.num_steps
        states = []
        for chapter in STORY:
            chapter(desk)
            assert desk.store.flush()
            states.append(State.of(desk))
        desk.store.close()
        return disk.num_steps - first, states


def each_step(num_steps: int, every: bool) -> list[tuple[int, Fault]]:
    """Which step fails, and how."""
    if every:
        return [(number, fault) for number in range(num_steps) for fault in FAULTS]
    rng = random.Random(num_steps)
    return [(number, rng.choice(FAULTS)) for number in sorted(rng.sample(range(num_steps), SAMPLE))]


def test_a_disk_that_fails_until_it_is_mended(
    untroubled: tuple[int, list[State]], request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    num_steps, states = untroubled
    for number, fault in each_step(num_steps, request.config.getoption("--every", default=False)):
        tell(number, fault, None, states, caplog, assert_degraded)


def test_a_disk_that_fails_once(
    untroubled: tuple[int, list[State]], request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    num_steps, states = untroubled
    for number, fault in each_step(num_steps, request.config.getoption("--every", default=False)):
        tell(number, fault, 1, states, caplog, assert_told)


Look = Callable[[Desk, FailingDisk, Fault, bool, list[str]], None]


def tell(
    number: int,
    fault: Fault,
    num_failures: int | None,
    states: list[State],
    caplog: pytest.LogCaptureFixture,
    look: Look,
) -> None:
    """The whole story on a disk that fails at one step; `look` when it has."""
    with ram_folder() as base:
        folder = base / "data"
        Desk.open(folder).store.close()
        disk = FailingDisk(fault, num_failures)
        desk = Desk.open(folder, disk)
        disk.arm(number)
        seen = False
        for chapter, state in zip(STORY, states, strict=True):
            caplog.clear()
            raised = not succeeds(chapter, desk)
            serves(desk)
            if disk.failed and not seen:
                seen = True
                look(desk, disk, fault, raised, messages(caplog))
                disk.mend()
            until_saved(chapter, desk, raised)
            assert desk.store.health() == (), (number, fault.name)
            assert_promised(State.of(desk), state, f"step {number}, {fault.name}")
        desk.store.close()
        assert_sound(folder, states[-1])


def succeeds(chapter: Chapter, desk: Desk) -> bool:
    try:
        chapter(desk)
    except (StoreError, DeadlineExceeded):
        return False
    return True


def until_saved(chapter: Chapter, desk: Desk, raised: bool) -> None:
    """What failed is asked for again; what was taken is saved by itself."""
    for _ in range(MOST_TRIES):
        if raised:
            raised = not succeeds(chapter, desk)
        elif desk.store.flush():
            return
    raise AssertionError(f"not saved: {desk.store.health()}")


def serves(desk: Desk) -> None:
    """Everything that was said is known, on disk or not."""
    store = desk.store
    store.check()
    for agent in store.agents():
        assert len(store.history(agent.id)) == agent.num_tokens
    assert store.notebook.get(TENANT, "response", "none") is None


def assert_degraded(desk: Desk, disk: FailingDisk, fault: Fault, raised: bool, log: list[str]) -> None:
    """Health says what is wrong, or whoever asked was told; the log as well."""
    codes = {reason.code for reason in desk.store.health()}
    # A log that cannot be folded in grows, and may leave no room in the quota.
    assert codes <= {fault.code, "quota_too_small"}, codes
    if set(disk.failed) <= SILENT:
        return
    assert codes or raised, f"{disk.failed} failed, and nobody was told"
    if codes:
        assert any(line.startswith("degraded: ") and "resumes by itself" in line for line in log), log
    if set(disk.failed) & {"open_temp", "write", "fsync", "close", "rename"}:
        assert desk.store.stats().counts["failed_writes"] > 0 or raised


def assert_told(_: Desk, disk: FailingDisk, __: Fault, raised: bool, log: list[str]) -> None:
    """It may be over before anybody asks, but then the log has it."""
    assert raised or log or disk.failed == ["fsync_folder"], f"{disk.failed} failed in silence"


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("dormouse.store") and record.levelno >= logging.WARNING
    ]


def assert_promised(found: State, state: State, where: str) -> None:
    assert found.agents == state.agents, where
    assert found.checkpoints == state.checkpoints, where
    assert found.documents == state.documents, where
    assert found.replies == state.replies, where


def assert_sound(folder: Path, state: State) -> None:
    """What is on disk in the end is all of it, and nothing else."""
    again = Desk.open(folder)
    store = again.store
    assert store.verify().is_clean
    store.check()
    assert not list(folder.rglob("*.tmp"))
    assert not list((folder / "quarantine").iterdir())
    assert store.stats().nbytes == nbytes_below(folder)
    assert_promised(State.of(again), state, "after a restart")
    store.close()
