"""The disk quota: what goes first, what stays, and that it holds all the time."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

from tests.store.kit import (
    BLOCK_SIZE,
    NAMESPACE,
    Clock,
    GatedOps,
    OpenStore,
    UnsyncedOps,
    agent_id,
    assert_loads,
    links_of,
    load,
    nbytes_below,
    payload_of,
    put_all,
    reply,
)

from dormouse.domain.blocks import Link
from dormouse.store.block_store import BlockStore

SMALL_QUOTA = 2 << 20


def talk(number: int, num_blocks: int = 4) -> list[int]:
    """Tokens that share nothing with another talk."""
    return list(range(number * 1000, number * 1000 + num_blocks * BLOCK_SIZE))


def stored(store: BlockStore, links: list[Link]) -> list[bool]:
    return [store.contains(link.key) for link in links]


def fill(store: BlockStore, clock: Clock, first: int = 100) -> None:
    """Anonymous talk until something had to go."""
    number = first
    while not store.stats().counts["evictions"]:
        clock.advance(1)
        for link in links_of(talk(number)):
            assert store.put(NAMESPACE, link, payload_of(link.key))
        store.flush()
        number += 1


def test_the_least_recently_used_goes_first_and_its_end_before_its_start(
    open_store: OpenStore, clock: Clock
) -> None:
    store = open_store(quota_nbytes=SMALL_QUOTA, file_ops=UnsyncedOps())
    old = reply(store, "old", talk(1))
    clock.advance(1)
    young = reply(store, "young", talk(2))
    clock.advance(1)
    store.touch([link.key for link in old[:2]])
    fill(store, clock)
    while any(stored(store, young)):
        fill_one(store, clock)
    states = [stored(store, old)]
    while any(states[-1]):
        fill_one(store, clock)
        states.append(stored(store, old))
    assert states[0][2:] == [False, False], "untouched, they went with `young`"
    for state in states:
        assert state == sorted(state, reverse=True), "never a start without what is before it"
    assert store.history(agent_id("old")) == talk(1)
    assert store.history(agent_id("young")) == talk(2)


def fill_one(store: BlockStore, clock: Clock) -> None:
    clock.advance(1)
    for link in links_of(talk(int(clock.now) % 1_000_000)):
        assert store.put(NAMESPACE, link, payload_of(link.key))
    store.flush()


def test_pinned_agents_go_last(open_store: OpenStore, clock: Clock) -> None:
    store = open_store(quota_nbytes=SMALL_QUOTA, file_ops=UnsyncedOps())
    pinned = reply(store, "pinned", talk(1))
    store.set_pinned("acme", "pinned", True)
    assert store.agent("acme", "pinned").pinned
    clock.advance(1)
    other = reply(store, "other", talk(2))
    fill(store, clock)
    while any(stored(store, other)):
        fill_one(store, clock)
    assert all(stored(store, pinned))
    assert store.stats().counts["evictions"] > 4
    store.set_pinned("acme", "pinned", False)
    while any(stored(store, pinned)):
        fill_one(store, clock)
    assert store.history(agent_id("pinned")) == talk(1)


def test_pins_survive_a_restart_and_an_update(open_store: OpenStore) -> None:
    store = open_store()
    reply(store, "ada", talk(1))
    store.set_pinned("acme", "ada", True)
    reply(store, "ada", talk(1, 5))
    store.close()
    assert open_store().agent("acme", "ada").pinned


def test_evicted_anonymous_blocks_leave_no_rows(open_store: OpenStore, folder: Path, clock: Clock) -> None:
    store = open_store(quota_nbytes=SMALL_QUOTA, file_ops=UnsyncedOps())
    fill(store, clock)
    assert store.stats().num_history_only == 0
    store.close()
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection:
        assert connection.execute("SELECT count(*) FROM blocks WHERE nbytes = 0").fetchone() == (0,)


def test_the_quota_holds_at_every_sample(open_store: OpenStore, folder: Path, clock: Clock) -> None:
    store = open_store(quota_nbytes=SMALL_QUOTA, file_ops=UnsyncedOps())
    done = threading.Event()
    samples: list[int] = []

    def sample() -> None:
        while not done.is_set():
            samples.append(nbytes_below(folder))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        for number in range(90):
            clock.advance(1)
            reply(store, f"agent {number % 7}", talk(number, 6))
    finally:
        done.set()
        sampler.join()
    assert store.stats().counts["evictions"] > 50
    assert max(samples) <= SMALL_QUOTA
    assert len(samples) > 20
    assert store.flush()
    assert store.stats().nbytes == nbytes_below(folder)
    assert store.verify().is_clean


def test_a_smaller_quota_is_enforced_at_start(open_store: OpenStore, folder: Path, clock: Clock) -> None:
    store = open_store(file_ops=UnsyncedOps())
    for number in range(60):
        clock.advance(1)
        reply(store, f"agent {number}", talk(number, 6))
    store.close()
    assert nbytes_below(folder) > SMALL_QUOTA
    store = open_store(quota_nbytes=SMALL_QUOTA, file_ops=UnsyncedOps())
    assert store.stats().nbytes == nbytes_below(folder) <= SMALL_QUOTA
    assert all(store.history(agent_id(f"agent {n}")) == talk(n, 6) for n in range(60))
    assert all(stored(store, links_of(talk(59, 6))))


def test_a_quota_that_holds_nothing_says_so_and_keeps_history(open_store: OpenStore) -> None:
    store = open_store(quota_nbytes=1000)
    links = links_of(talk(1))
    for link in links:
        store.put(NAMESPACE, link, payload_of(link.key))
    reply(store, "ada", [])
    assert [reason.code for reason in store.health()] == ["quota_too_small"]
    assert not any(stored(store, links))
    assert store.agents()


def test_a_load_that_meets_an_eviction_is_a_hit_or_a_miss(open_store: OpenStore, clock: Clock) -> None:
    store = open_store(quota_nbytes=SMALL_QUOTA, file_ops=UnsyncedOps())
    links = reply(store, "ada", talk(1))
    stop = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not stop.is_set():
            for link in links:
                error, payload = load(store, link.key)
                if error is None and payload != payload_of(link.key):
                    wrong.append(link)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(4):
            for link in links:
                store.put(NAMESPACE, link, payload_of(link.key))
            store.flush()
            while any(stored(store, links)):
                fill_one(store, clock)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not wrong
    counts = store.stats().counts
    assert counts["damaged"] == 0
    assert counts["loads"] > 0


def test_a_block_can_be_read_while_the_writer_waits(open_store: OpenStore) -> None:
    ops = GatedOps("open_temp")
    store = open_store(file_ops=ops)
    links = reply(store, "ada", talk(1))
    ops.gate.clear()
    put_all(store, links_of(talk(2)))
    assert_loads(store, links)
    ops.gate.set()
