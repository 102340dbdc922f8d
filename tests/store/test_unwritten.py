"""Blocks that the disk did not take: they stay, and are written when it does, if they are still wanted."""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
from pathlib import Path

import pytest
from tests.store.kit import (
    CACHE,
    NAMESPACE,
    WAIT_S,
    FailingOps,
    FaultyOps,
    OpenStore,
    assert_loads,
    block_files,
    links_of,
    nbytes_below,
    payload_of,
    put_all,
    reply,
    save,
    update_of,
)

from dormouse.store.block_store import BlockStore
from dormouse.store.options import StoreOptions

BROKEN = OSError(errno.EIO, "Input/output error")
NEVER = StoreOptions(retry_s=3600)
"""Tried again when somebody asks for it, and not by the clock."""


@pytest.fixture
def ops() -> FailingOps:
    return FailingOps()


def test_a_block_is_written_without_being_asked_for(open_store: OpenStore) -> None:
    broken = [True]
    committed = threading.Event()

    def hook(step: str, _: object) -> None:
        if step == "rename" and broken:
            raise BROKEN
        if step == "commit" and not broken:
            committed.set()

    store = open_store(file_ops=FaultyOps(hook), options=StoreOptions(retry_s=0.01))
    links = links_of(range(40))
    put_all(store, links)
    assert save(store, "ada", links)
    assert [reason.code for reason in store.health()] == ["write_failed"]
    broken.clear()
    assert committed.wait(WAIT_S)
    assert store.flush()
    assert store.health() == ()
    assert store.agent("acme", "ada").durable_tokens == 40


def test_one_block_that_fails_holds_up_no_other(open_store: OpenStore, folder: Path) -> None:
    links = links_of([3] * 160)
    poisoned = links[4].key.hex()

    def hook(step: str, path: object) -> None:
        if step == "rename" and poisoned in str(path):
            raise BROKEN

    store = open_store(file_ops=FaultyOps(hook), options=StoreOptions(retry_s=0.01))
    put_all(store, links)
    assert save(store, "ada", links)
    assert not store.flush()
    assert block_files(folder) == {link.key.hex() for link in links} - {poisoned}
    assert store.agent("acme", "ada").durable_tokens == 4 * CACHE.block_size
    assert_loads(store, links)


def test_memory_is_bounded_while_the_disk_fails(open_store: OpenStore, ops: FailingOps) -> None:
    """Half of the queue's bound is for blocks that fail, the rest for others."""
    room = 6 * CACHE.block_nbytes
    store = open_store(file_ops=ops, options=StoreOptions(queue_nbytes=room, retry_s=3600))
    ops.errors["write"] = BROKEN
    links = links_of([3] * 160)
    for link in links:
        assert store.put(NAMESPACE, link, payload_of(link.key))
        assert not store.flush()
    assert store.stats().pending_nbytes == room // 2
    assert [store.contains(link.key) for link in links] == [True] * 3 + [False] * 7
    ops.errors.clear()
    assert store.flush()
    for link in links:
        assert store.put(NAMESPACE, link, payload_of(link.key))
        assert store.flush()
    assert all(store.has_durable(link.key) for link in links)
    assert store.stats().pending_nbytes == 0


def test_closing_tries_once_more(open_store: OpenStore, ops: FailingOps) -> None:
    store = open_store(file_ops=ops, options=NEVER)
    ops.errors["open_temp"] = BROKEN
    links = links_of([3] * 16 * 40)  # more than are tried at a time
    put_all(store, links)
    assert save(store, "ada", links)
    del ops.errors["open_temp"]
    store.close()
    assert open_store().agent("acme", "ada").durable_tokens == 16 * 40


def test_closing_tries_the_others_when_one_fails(open_store: OpenStore, folder: Path) -> None:
    links = links_of([3] * 16 * 40)
    broken = {link.key.hex() for link in links}

    def hook(step: str, path: object) -> None:
        if step == "rename" and Path(str(path)).stem in broken:
            raise BROKEN

    store = open_store(file_ops=FaultyOps(hook), options=NEVER)
    put_all(store, links)
    assert not store.flush()
    broken.clear()
    broken.add(links[0].key.hex())
    store.close()
    assert block_files(folder) == {link.key.hex() for link in links[1:]}


@pytest.mark.parametrize("step", ["write", "commit"])
def test_what_was_deleted_meanwhile_is_not_written(
    open_store: OpenStore, ops: FailingOps, folder: Path, step: str
) -> None:
    store = open_store(file_ops=ops, options=NEVER)
    links, others = links_of(range(40)), links_of(range(100, 140))
    ops.errors[step] = BROKEN if step == "write" else sqlite3.OperationalError("disk I/O error")
    for name, chain in (("ada", links), ("bob", others)):
        put_all(store, chain)
        save(store, name, chain)
    assert store.stats().num_pending == 6
    if step == "commit":
        ops.errors.clear()  # nothing of her is recorded; deleting her writes all the same
    store.delete_agent("acme", "ada")
    ops.errors.clear()
    assert store.flush()
    assert block_files(folder) == {link.key.hex() for link in others}
    assert not any(store.contains(link.key) for link in links)
    assert_loads(store, others)
    assert store.stats().num_pending == 0
    assert store.stats().nbytes == nbytes_below(folder)


def test_a_tail_that_was_replaced_meanwhile_is_not_written(open_store: OpenStore, folder: Path) -> None:
    short, long = links_of(range(20)), links_of(range(30))
    broken = [short[1].key.hex()]

    def hook(step: str, path: object) -> None:
        if step == "rename" and any(key in str(path) for key in broken):
            raise BROKEN

    store = open_store(file_ops=FaultyOps(hook), options=NEVER)
    put_all(store, short)
    assert save(store, "ada", short)
    reply(store, "ada", range(30))
    broken.clear()
    assert store.flush()
    assert block_files(folder) == {link.key.hex() for link in long}
    assert store.stats().num_pending == 0


def test_a_tail_that_is_written_as_its_agent_leaves_it_can_be_deleted(
    open_store: OpenStore, folder: Path
) -> None:
    """It is tried again in the batch in which the agent goes on, without the block that it goes on in."""
    short, long = links_of(range(20)), links_of(range(30))
    broken = [short[1].key.hex()]
    gate, reached = threading.Event(), threading.Event()
    gate.set()

    def hook(step: str, path: object) -> None:
        if step == "rename" and any(key in str(path) for key in broken):
            raise BROKEN
        if step == "commit" and not gate.is_set():
            reached.set()
            assert gate.wait(WAIT_S)

    store = open_store(file_ops=FaultyOps(hook), options=StoreOptions(retry_s=0.2))
    put_all(store, short)
    assert save(store, "ada", short)
    gate.clear()
    store.save_agent(update_of("bob", []))
    assert reached.wait(WAIT_S)
    broken.clear()
    threading.Event().wait(0.3)
    store.save_agent(update_of("ada", long))
    gate.set()
    assert store.flush()
    assert store.stats().nbytes == nbytes_below(folder)
    store.delete_agent("acme", "ada")
    store.gc()
    assert block_files(folder) == set()


def test_an_agents_quota_holds_for_blocks_that_come_late(open_store: OpenStore, ops: FailingOps) -> None:
    store = open_store(file_ops=ops, options=NEVER)
    reply(store, "ada", range(16))
    store.admin.configure("acme", "ada", quota_nbytes=2 * CACHE.block_nbytes)
    ops.errors["write"] = BROKEN
    links = links_of([3] * 160)
    put_all(store, links)
    assert save(store, "ada", links)
    ops.errors.clear()
    assert store.flush()
    assert store.agent("acme", "ada").stored_nbytes <= 2 * CACHE.block_nbytes


def test_a_catalog_that_is_broken_for_long_wears_out_no_disk(open_store: OpenStore) -> None:
    """Files that can be written, and rows that cannot: one file is tried at a time."""
    renamed: list[str] = []
    opened: list[BlockStore] = []

    def hook(step: str, path: object) -> None:
        if step == "rename":
            renamed.append(str(path))
        if step == "commit" and opened:
            raise sqlite3.OperationalError("disk I/O error")

    store = open_store(file_ops=FaultyOps(hook), options=NEVER)
    opened.append(store)
    put_all(store, links_of([3] * 160))
    assert not store.flush()
    before = len(renamed)
    for _ in range(5):
        assert not store.flush()
    assert len(renamed) == before + 5
    opened.clear()
    assert store.flush()
    assert store.stats().num_blocks == 10


def test_closing_ends_although_the_disk_hangs(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dormouse.store.writer._STOP_S", 0.2)
    gate = threading.Event()
    broken = [True]

    def hook(step: str, _: object) -> None:
        if step == "write" and broken:
            raise BROKEN
        if step == "write":
            gate.wait(WAIT_S)

    store = open_store(file_ops=FaultyOps(hook), options=NEVER)
    put_all(store, links_of(range(40)))
    assert not store.flush()
    broken.clear()
    store.close()
    gate.set()


def test_health_says_when_it_begins_and_when_it_ends(
    open_store: OpenStore, caplog: pytest.LogCaptureFixture
) -> None:
    """However often a part of it succeeds meanwhile."""
    caplog.set_level(logging.INFO)
    links = links_of([3] * 160)
    poisoned = [links[4].key.hex()]

    def hook(step: str, path: object) -> None:
        if step == "rename" and any(key in str(path) for key in poisoned):
            raise BROKEN

    store = open_store(file_ops=FaultyOps(hook), options=NEVER)
    for link in links:
        put_all(store, [link])
        store.flush()
    poisoned.clear()
    assert store.flush()
    lines = [record.getMessage() for record in caplog.records if record.name == "dormouse.store.health"]
    assert [line.partition(":")[0] for line in lines] == ["degraded", "block files can be written again"]


def test_blocks_beyond_the_quota_are_dropped(open_store: OpenStore) -> None:
    """No disk that is mended makes room for them."""
    store = open_store(quota_nbytes=CACHE.block_nbytes, options=NEVER)
    links = links_of(range(40))
    put_all(store, links)
    assert not store.flush()
    assert [reason.code for reason in store.health()] == ["quota_too_small"]
    assert store.stats().num_pending == 0
