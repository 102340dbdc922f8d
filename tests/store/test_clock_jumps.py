"""The machine's clock is set, by years, either way: nothing is lost, and the order of uses stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.store.kit import (
    NAMESPACE,
    Clock,
    OpenStore,
    agent_id,
    assert_loads,
    block_files,
    links_of,
    reply,
)

from dormouse.store.block_store import BlockStore
from dormouse.store.clock import SteadyClock

YEARS = 5 * 365 * 86400.0
QUOTA = 1 << 20


def fill(store: BlockStore, clock: Clock, names: range) -> list[str]:
    """One agent after the other, 16 blocks each; who still has blocks at the end, in that order."""
    for name in names:
        clock.advance(60)
        reply(store, f"a{name}", [name] * 256)
    assert store.flush()
    return [f"a{name}" for name in names if store.contains(links_of([name] * 256)[0].key)]


def test_a_clock_that_is_set_back_goes_on_from_where_it_was() -> None:
    wall = Clock()
    steady = SteadyClock(wall)
    started = steady()
    wall.advance(10)
    assert steady() == started + 10
    wall.advance(-YEARS)
    assert steady() == started + 10
    wall.advance(5)
    assert steady() == started + 15
    wall.advance(YEARS)
    assert steady() == pytest.approx(started + 15 + YEARS)


@pytest.mark.parametrize("jump_s", [YEARS, -YEARS])
@pytest.mark.parametrize("restarts", [False, True])
def test_the_longest_unused_go_first_whatever_the_clock_says(
    open_store: OpenStore, clock: Clock, jump_s: float, restarts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(quota_nbytes=QUOTA)
    before = fill(store, clock, range(2))
    clock.advance(jump_s)
    if restarts:
        store.close()
        store = open_store(quota_nbytes=QUOTA)
        assert ("the clock was set back" in caplog.text) == (jump_s < 0)
    after = fill(store, clock, range(2, 8))
    left = fill(store, clock, range(0))
    assert left == []
    names = [f"a{name}" for name in range(8) if store.contains(links_of([name] * 256)[0].key)]
    assert len(names) < 8, "nothing was evicted"
    assert names == [*before, *after][-len(names) :] == [f"a{name}" for name in range(8 - len(names), 8)]
    for name in range(8):
        assert store.history(agent_id(f"a{name}")) == [name] * 256
    assert store.health() == ()


def test_a_clock_that_was_ahead_keeps_its_order_after_a_restart(open_store: OpenStore, clock: Clock) -> None:
    store = open_store(quota_nbytes=QUOTA)
    clock.advance(YEARS)
    fill(store, clock, range(4))
    store.close()
    clock.advance(-2 * YEARS)
    store = open_store(quota_nbytes=QUOTA)
    names = [agent.id.name for agent in store.agents()]
    assert names == ["a3", "a2", "a1", "a0"], "last used first"
    assert max(agent.used_at for agent in store.agents()) <= clock() + 1
    clock.advance(1)
    reply(store, "a0", [0] * 256)
    assert store.agents()[0].id.name == "a0"


def test_garbage_is_as_old_as_its_last_use(open_store: OpenStore, clock: Clock, folder: Path) -> None:
    """A clock that is set back makes nothing older; one that is set forward makes what nobody reaches old."""
    store = open_store()
    links = links_of(range(16))
    reply(store, "ada", range(16))
    store.admin.tag("acme", "ada", "here")
    reply(store, "ada", [5] * 16)
    store.admin.untag("acme", "ada", "here")
    clock.advance(-YEARS)
    store.gc(unused_for_s=60)
    assert store.contains(links[0].key)
    clock.advance(3 * YEARS)
    store.gc(unused_for_s=60)
    assert not store.contains(links[0].key)
    assert len(block_files(folder)) == 1, "what an agent reaches stays, however old"


def test_remembered_replies_outlive_a_clock_that_is_set_back(open_store: OpenStore, clock: Clock) -> None:
    store = open_store()
    store.notebook.remember(NAMESPACE, b"old", [1])
    clock.advance(-YEARS)
    store.notebook.remember(NAMESPACE, b"new", [2])
    assert store.notebook.recall(NAMESPACE, b"old") == (1,)
    store.close()
    store = open_store()
    assert store.notebook.recall(NAMESPACE, b"old") == (1,)
    assert store.notebook.recall(NAMESPACE, b"new") == (2,)
    assert store.verify().is_clean


def test_remembered_replies_expire_when_the_clock_is_set_forward_and_no_text_is_lost(
    open_store: OpenStore, clock: Clock
) -> None:
    """That is as after years without use: the replies are tokenized anew; agents and blocks stay."""
    store = open_store()
    links = reply(store, "ada", range(40))
    store.notebook.remember(NAMESPACE, b"old", [1])
    assert store.flush()
    clock.advance(YEARS)
    store.notebook.remember(NAMESPACE, b"new", [2])
    assert store.notebook.recall(NAMESPACE, b"old") is None
    assert store.notebook.recall(NAMESPACE, b"new") == (2,)
    assert store.history(agent_id("ada")) == list(range(40))
    assert_loads(store, links)
    assert store.health() == ()


def test_documents_keep_their_order_of_use(open_store: OpenStore, clock: Clock) -> None:
    store = open_store()
    for number in range(3):
        clock.advance(1)
        store.notebook.put("acme", "response", f"r{number}", b"[]")
    assert store.flush()
    clock.advance(-YEARS)
    assert store.notebook.get("acme", "response", "r0") == b"[]"
    used = {info.id: info.used_at for info in store.notebook.page("acme", "response")}
    assert used["r0"] >= used["r2"] > used["r1"]
    store.close()
    store = open_store()
    used = {info.id: info.used_at for info in store.notebook.page("acme", "response")}
    assert max(used.values()) <= clock() + 1
