"""Disks that fail: serving goes on, health says why, saving resumes by itself."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.store.kit import (
    CACHE,
    NAMESPACE,
    WAIT_S,
    FailingOps,
    FaultyOps,
    GatedOps,
    OpenStore,
    agent_id,
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

from dormouse.domain.errors import DeadlineExceeded, StoreError
from dormouse.store.block_store import BlockStore
from dormouse.store.options import StoreOptions

FULL = OSError(errno.ENOSPC, "No space left on device")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")
BROKEN = OSError(errno.EIO, "Input/output error")
FAST_RETRY = StoreOptions(retry_s=0.01)


def codes(store: BlockStore) -> list[str]:
    return [reason.code for reason in store.health()]


@pytest.mark.parametrize(
    ("error", "code"), [(FULL, "disk_full"), (READ_ONLY, "store_read_only"), (BROKEN, "write_failed")]
)
@pytest.mark.parametrize(
    "step", ["make_folder", "open_temp", "write", "fsync", "close", "rename", "fsync_folder"]
)
def test_a_failed_block_is_kept_and_written_again_later(
    open_store: OpenStore, folder: Path, step: str, error: OSError, code: str
) -> None:
    ops = FailingOps()
    store = open_store(file_ops=ops, options=StoreOptions(retry_s=3600))
    links = links_of(range(40))
    ops.errors[step] = error
    put_all(store, links)
    assert save(store, "ada", links), "history does not need the blocks"
    assert not store.flush()
    assert codes(store) == [code]
    assert_loads(store, links)
    assert not any(store.has_durable(link.key) for link in links)
    assert store.stats().num_pending == 3
    assert store.stats().counts["failed_writes"] == 6, "written when they came, and by the flush"
    assert store.history(agent_id("ada")) == list(range(40))
    assert not list(folder.rglob("*.tmp"))
    ops.errors.clear()
    assert store.flush()
    assert codes(store) == []
    assert_loads(store, links)
    assert store.agent("acme", "ada").durable_tokens == 40
    assert store.stats().nbytes == nbytes_below(folder)
    assert not list(folder.rglob("*.tmp"))


def test_a_catalog_that_fails_keeps_agents_until_it_works(open_store: OpenStore, folder: Path) -> None:
    ops = FailingOps()
    store = open_store(file_ops=ops, options=FAST_RETRY)
    reply(store, "ada", range(20))
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    ops.errors["commit"] = full
    links = links_of(range(40))
    put_all(store, links)
    assert not save(store, "ada", links[:2])
    assert not save(store, "ada", links, rest=[5])
    assert codes(store) == ["disk_full"]
    assert store.history(agent_id("ada")) == [*range(40), 5], "memory has the newest"
    assert_loads(store, links)
    with pytest.raises(StoreError):
        store.delete_agent("acme", "ada")
    assert links[2].key.hex() not in block_files(folder), "a file without a row is taken back"
    ops.errors.clear()
    assert store.flush()
    assert codes(store) == []
    assert all(store.has_durable(link.key) for link in links)
    store.close()
    again = open_store()
    assert again.history(agent_id("ada")) == [*range(40), 5]
    assert again.stats().nbytes == nbytes_below(folder)


def test_a_failed_save_is_tried_again_without_being_asked(open_store: OpenStore) -> None:
    committed = threading.Event()
    broken = [True]

    def hook(step: str, _: object) -> None:
        if step == "commit" and opened:
            if broken:
                raise sqlite3.OperationalError("disk I/O error")
            committed.set()

    opened: list[BlockStore] = []
    opened.append(open_store(file_ops=FaultyOps(hook), options=FAST_RETRY))
    assert not save(opened[0], "ada", [], rest=[1])
    broken.clear()
    assert committed.wait(WAIT_S)
    assert opened[0].flush()
    assert opened[0].stats().num_unsaved_agents == 0


def test_uses_are_recorded_without_any_write(open_store: OpenStore) -> None:
    ops = GatedOps("commit")
    store = open_store(file_ops=ops, options=StoreOptions(touch_interval_s=0.01))
    links = reply(store, "ada", range(20))
    assert store.flush()
    ops.reached.clear()
    ops.gate.clear()
    store.touch([link.key for link in links])
    assert ops.reached.wait(WAIT_S)
    ops.gate.set()


def test_an_agent_that_was_never_saved_can_be_deleted(open_store: OpenStore) -> None:
    ops = FailingOps()
    store = open_store(file_ops=ops)
    ops.errors["commit"] = sqlite3.OperationalError("disk I/O error")
    assert not save(store, "ada", [], rest=[1])
    assert [agent.durable_tokens for agent in store.agents()] == [0]
    store.delete_agent("acme", "ada")
    assert store.agents() == []
    ops.errors.clear()
    reply(store, "bob", range(20))
    assert [agent.id.name for agent in store.agents()] == ["bob"]


def test_an_error_of_ours_is_loud(open_store: OpenStore, caplog: pytest.LogCaptureFixture) -> None:
    ops = FailingOps()
    store = open_store(file_ops=ops)
    ops.errors["rename"] = ZeroDivisionError("a bug")
    links = links_of(range(40))
    put_all(store, links)
    assert not save(store, "ada", links)
    assert not store.flush()
    assert codes(store) == ["writer_stopped"]
    assert "a bug" in caplog.text
    assert not store.put(NAMESPACE, links[0], payload_of(links[0].key))
    assert not save(store, "ada", links)
    assert store.history(agent_id("ada")) == list(range(40))
    with pytest.raises(StoreError, match="restart"):
        store.gc()


def test_nobody_is_answered_twice(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    ops = GatedOps("commit")
    store = open_store(file_ops=ops)
    monkeypatch.setattr("dormouse.store.keeper.unreached", bug)
    ops.gate.clear()
    store.save_agent(update_of("first", []))
    assert ops.reached.wait(WAIT_S)
    answers: list[bool] = []
    store.save_agent(update_of("ada", []), answers.append)
    with pytest.raises(DeadlineExceeded):
        store.gc(timeout_s=0.01)
    store.save_agent(update_of("bob", []), answers.append)
    ops.gate.set()
    with pytest.raises(StoreError):
        store.gc()
    assert answers == [True, False]
    assert codes(store) == ["writer_stopped"]


def test_a_deadline_is_kept(open_store: OpenStore) -> None:
    ops = GatedOps("commit")
    store = open_store(file_ops=ops)
    ops.gate.clear()
    store.save_agent(update_of("ada", []))
    with pytest.raises(DeadlineExceeded):
        store.gc(timeout_s=0.01)
    assert not store.flush(timeout_s=0.01)
    ops.gate.set()
    assert store.flush()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "dormouse-test", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root and CAP_SYS_ADMIN")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill_disk(ballast: Path) -> None:
    """Leave no free byte."""
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(ballast).f_bavail == 0


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    folder = small_disk / "data"
    ballast = small_disk / "ballast"
    with BlockStore.open(folder, quota_nbytes=1 << 30, options=FAST_RETRY) as store:
        store.register(NAMESPACE, CACHE)
        kept = reply(store, "ada", range(40))
        fill_disk(ballast)
        links = links_of([3] * 160)
        put_all(store, links)
        save(store, "bob", links)
        assert not store.flush()
        assert "disk_full" in codes(store)
        assert_loads(store, kept)
        assert store.history(agent_id("bob")) == [3] * 160
        ballast.unlink()
        assert store.flush()
        assert all(store.has_durable(link.key) for link in links)
        assert_loads(store, links)
        assert store.verify().is_clean
        store.check()
        assert store.stats().nbytes == nbytes_below(folder)


def test_a_store_opens_on_a_full_disk(small_disk: Path) -> None:
    folder = small_disk / "data"
    with BlockStore.open(folder, quota_nbytes=1 << 30) as store:
        store.register(NAMESPACE, CACHE)
        kept = reply(store, "ada", range(40))
    fill_disk(small_disk / "ballast")
    with BlockStore.open(folder, quota_nbytes=1 << 30) as store:
        store.register(NAMESPACE, CACHE)
        assert_loads(store, kept)
        assert store.history(agent_id("ada")) == list(range(40))
