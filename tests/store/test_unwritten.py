"""Blocks that the disk did not take: they stay, and are written when it does, if they are still wanted."""

from __future__ import annotations

import errno
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
)

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
    room = 3 * CACHE.block_nbytes
    store = open_store(file_ops=ops, options=StoreOptions(queue_nbytes=room, retry_s=3600))
    ops.errors["write"] = BROKEN
    links = links_of([3] * 160)
    taken = [store.put(NAMESPACE, link, payload_of(link.key)) for link in links]
    assert taken == [True] * 3 + [False] * 7
    assert not store.flush()
    assert store.stats().pending_nbytes == room
    ops.errors.clear()
    assert store.flush()
    put_all(store, links[3:6])
    assert store.flush()
    assert store.stats().pending_nbytes == 0


def test_closing_tries_once_more(open_store: OpenStore, ops: FailingOps) -> None:
    store = open_store(file_ops=ops, options=NEVER)
    ops.errors["open_temp"] = BROKEN
    links = links_of([3] * 16 * 40)  # more than are tried at a time
    put_all(store, links)
    assert save(store, "ada", links)
    ops.errors.clear()
    store.close()
    assert open_store().agent("acme", "ada").durable_tokens == 16 * 40


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


def test_blocks_beyond_the_quota_are_dropped(open_store: OpenStore) -> None:
    """No disk that is mended makes room for them."""
    store = open_store(quota_nbytes=CACHE.block_nbytes, options=NEVER)
    links = links_of(range(40))
    put_all(store, links)
    assert not store.flush()
    assert [reason.code for reason in store.health()] == ["quota_too_small"]
    assert store.stats().num_pending == 0
