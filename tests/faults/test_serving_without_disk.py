"""A disk that hangs, is slow, full, read-only or gone while the server serves over HTTP."""

from __future__ import annotations

import errno
import logging
import shutil
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.faults.conftest import Serve
from tests.faults.faulty import WAIT_S, Gate, Site, text_of
from tests.store.kit import FailingOps, GatedOps

from dormouse.api import health
from dormouse.domain.blocks import BlockKey
from dormouse.engine import loads
from dormouse.engine.options import EngineOptions
from dormouse.store import disk_watch, reader
from dormouse.store.options import StoreOptions
from dormouse.store.reader import BlockReader, LoadError

PROMPT = "{}: a talk that is long enough to fill several blocks of sixteen tokens each"
FAST = StoreOptions(retry_s=0.01)
IMPATIENT = EngineOptions(load_timeout_s=0.1)


def put_to_sleep(site: Site, *names: str) -> dict[str, str]:
    """Agents whose blocks are on disk and nowhere else, and what each said."""
    said = {name: text_of(site.chat(PROMPT.format(name), agent=name)) for name in names}
    assert site.store.flush()
    for name in names:
        assert site.http.post(f"/v1/agents/{name}/sleep").status_code == 200
    return said


def wake(site: Site, name: str) -> tuple[str, int]:
    """What the agent says to the same question, and how many tokens it was read from disk."""
    answer = site.chat(PROMPT.format(name), agent=name)
    used = answer.json()["usage"]["prompt_tokens_details"]
    return text_of(answer), used["disk_tokens"]


def until_read(site: Site, name: str) -> None:
    """An agent is read from disk again; for a while after a failure, it is not tried."""

    def is_read() -> bool:
        put_to_sleep(site, name)
        return wake(site, name)[1] > 0

    site.until(is_read)


def until_back(site: Site, elsewhere: Path) -> None:
    """The folder is in its place again. The writer may still make files in what stands there."""

    def is_back() -> bool:
        shutil.rmtree(site.folder, ignore_errors=True)
        try:
            elsewhere.rename(site.folder)
        except OSError:
            return False
        return True

    site.store.flush()
    site.until(is_back)


def until_saved(site: Site) -> None:
    """Nobody asks for it: what failed is tried again."""
    site.until_well()
    assert site.store.flush()


class HungDisk:
    """Reads of the blocks in `keys` (None: of all) wait for the gate."""

    def __init__(self, patch: pytest.MonkeyPatch, keys: set[BlockKey] | None) -> None:
        self.gate = Gate()
        read = BlockReader.read

        def hanging(me: BlockReader, key: BlockKey, into: memoryview) -> LoadError | None:
            if keys is None or key in keys:
                self.gate.wait()
            return read(me, key, into)

        patch.setattr(BlockReader, "read", hanging)


def num_readers() -> int:
    return sum(thread.name == "store-reader" for thread in threading.enumerate())


def test_reads_that_hang_hold_up_no_others(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """More files hang than there are readers: who waits for them computes, who needs others reads."""
    monkeypatch.setattr(loads, "_RETRY_READ_S", 0.05)
    site = serve(options=IMPATIENT)
    said = put_to_sleep(site, "ada", "bob")
    readers = num_readers()
    disk = HungDisk(monkeypatch, set(site.keys(PROMPT.format("ada"))))
    try:
        assert wake(site, "ada")[0] == said["ada"], "computed again"
        until_read(site, "bob")  # the readers were replaced
        assert (site.status(), site.reasons()) == ("degraded", {"read_stalled"})
        assert site.metric("dormouse_loading_blocks") > 0
    finally:
        disk.gate.open()
    site.until_well()
    assert site.metric("dormouse_loading_blocks") == 0
    site.until(lambda: num_readers() == readers)
    assert site.http.post("/v1/agents/ada/sleep").status_code == 200
    assert wake(site, "ada")[0] == said["ada"]


def test_a_disk_that_hangs_whole_is_not_asked_any_more(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "_RETRY_READ_S", 0.05)
    site = serve(options=IMPATIENT)
    names = [f"agent {number}" for number in range(12)]
    said = put_to_sleep(site, *names)
    readers = num_readers()
    disk = HungDisk(monkeypatch, None)
    try:
        for name in names:
            assert wake(site, name)[0] == said[name]
        assert site.logged(logging.ERROR, "blocks are computed instead")
        assert (site.status(), site.reasons()) == ("degraded", {"read_stalled"})
    finally:
        disk.gate.open()
    site.until_well()
    site.until(lambda: num_readers() == readers)
    until_read(site, names[0])


def test_a_server_ends_although_a_read_hangs(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    from dormouse.store import reader_pool

    monkeypatch.setattr(reader_pool, "_STOP_S", 0.1)
    site = serve(options=IMPATIENT)
    put_to_sleep(site, "ada")
    disk = HungDisk(monkeypatch, None)
    wake(site, "ada")
    site.store.flush()
    site.store._readers.stop()
    assert site.logged(logging.ERROR, "its thread is left behind")
    disk.gate.open()


def test_a_slow_disk_under_load(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    site = serve(num_pages=40)
    names = [f"agent {number}" for number in range(8)]
    said = put_to_sleep(site, *names)
    read = BlockReader.read

    def slow(me: BlockReader, key: BlockKey, into: memoryview) -> LoadError | None:
        threading.Event().wait(0.02)
        return read(me, key, into)

    monkeypatch.setattr(BlockReader, "read", slow)
    with ThreadPoolExecutor(len(names)) as threads:
        woken = dict(zip(names, threads.map(lambda name: wake(site, name), names), strict=True))
    assert {name: text for name, (text, _) in woken.items()} == said
    assert all(disk_tokens > 0 for _, disk_tokens in woken.values())
    assert (site.status(), site.reasons()) == ("ok", set())


def test_nobody_waits_for_a_write_that_hangs(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = GatedOps("write")
    site = serve(file_ops=ops)
    said = text_of(site.chat(PROMPT.format("bob")))
    assert site.store.flush()
    ops.gate.clear()
    try:
        assert text_of(site.chat(PROMPT.format("ada"), agent="ada"))
        assert ops.reached.wait(20)
        assert text_of(site.chat(PROMPT.format("bob"), agent="bob")) == said
        assert site.http.get("/v1/agents/ada").json()["durable_tokens"] == 0
        assert site.metric("dormouse_store_pending_bytes") > 0
        assert site.status() == "ok", "it may still come"
        monkeypatch.setattr(health, "_WRITE_STALLED_S", 0.0)
        assert "write_stalled" in site.reasons()
    finally:
        ops.gate.set()
    assert site.store.flush()
    site.until_well()
    agent = site.http.get("/v1/agents/ada").json()
    assert agent["durable_tokens"] == agent["tokens"] - 1 > 0


def test_sync_durability_gives_up_waiting_and_says_so(serve: Serve) -> None:
    ops = GatedOps("commit")
    site = serve(file_ops=ops, options=EngineOptions(sync=True, sync_timeout_s=0.2))
    text_of(site.chat(PROMPT.format("ada"), agent="ada"))
    ops.gate.clear()
    try:
        assert text_of(site.chat(PROMPT.format("bob"), agent="bob"))
        assert site.logged(logging.WARNING, "not on disk yet")
        assert site.http.get("/v1/agents/bob").json()["durable_tokens"] == 0
    finally:
        ops.gate.set()
    assert site.store.flush()
    assert site.http.get("/v1/agents/bob").json()["durable_tokens"] > 0


def full() -> Exception:
    return OSError(errno.ENOSPC, "No space left on device")


def catalog_full() -> Exception:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


FAULTS: list[tuple[str, Callable[[], Exception], str]] = [
    ("write", full, "disk_full"),
    ("commit", catalog_full, "disk_full"),
    ("open_temp", lambda: OSError(errno.EROFS, "Read-only file system"), "store_read_only"),
    ("open_temp", lambda: OSError(errno.EMFILE, "Too many open files"), "descriptors_exhausted"),
    ("fsync", lambda: OSError(errno.EIO, "Input/output error"), "write_failed"),
]


@pytest.mark.parametrize(("step", "error", "code"), FAULTS)
def test_serving_goes_on_without_the_disk_and_saving_resumes(
    serve: Serve, step: str, error: Callable[[], Exception], code: str
) -> None:
    ops = FailingOps()
    site = serve(file_ops=ops, store_options=FAST)
    before = put_to_sleep(site, "bob")
    ops.errors[step] = error()
    said = text_of(site.chat(PROMPT.format("ada"), agent="ada"))
    assert not site.store.flush()
    assert (site.status(), site.reasons()) == ("degraded", {code})
    assert site.http.get("/health/ready").status_code == 200, "it serves"
    assert site.logged(logging.ERROR, "saving resumes by itself")
    assert site.metric("dormouse_store_failed_writes_total") > 0
    assert wake(site, "bob")[0] == before["bob"], "what was saved is read"
    assert text_of(site.chat(PROMPT.format("ada"), agent="ada")) == said
    ops.errors.clear()
    until_saved(site)
    assert (site.status(), site.reasons()) == ("ok", set())
    assert site.logged(logging.INFO, "can be written again")
    agent = site.http.get("/v1/agents/ada").json()
    assert agent["durable_tokens"] == agent["tokens"] - 1, "all but the last one, whose KV nobody needed"
    assert site.store.verify().is_clean


def test_a_data_folder_that_goes_away_and_comes_back(serve: Serve) -> None:
    site = serve(store_options=FAST)
    before = put_to_sleep(site, "bob")
    elsewhere = site.folder.with_name("elsewhere")
    site.folder.rename(elsewhere)
    assert text_of(site.chat(PROMPT.format("ada"), agent="ada"))
    assert not site.store.flush()
    assert site.status() == "degraded"
    assert "disk_gone" in site.reasons()
    assert wake(site, "bob")[0] == before["bob"], "computed again"
    elsewhere.rename(site.folder)
    until_saved(site)
    assert (site.status(), site.reasons()) == ("ok", set())
    assert site.store.verify().is_clean


def test_another_folder_in_the_place_of_the_data_folder(serve: Serve) -> None:
    """What is written now goes nowhere: the catalog that is open has no name any more."""
    site = serve(store_options=FAST)
    put_to_sleep(site, "bob")
    elsewhere = site.folder.with_name("elsewhere")
    site.folder.rename(elsewhere)
    site.folder.mkdir()
    assert text_of(site.chat(PROMPT.format("ada"), agent="ada"))
    assert site.status() == "degraded"
    assert "disk_gone" in site.reasons()
    until_back(site, elsewhere)


def test_a_disk_that_does_not_answer_is_told_and_holds_up_nobody(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = serve()
    gate = Gate()
    usage = shutil.disk_usage

    def hanging(path: Path) -> object:
        gate.wait()
        return usage(path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", hanging)
        patch.setattr(disk_watch, "_STALLED_S", WAIT_S)
        assert (site.status(), site.reasons()) == ("ok", set()), "it may just be slow"
        patch.setattr(disk_watch, "_STALLED_S", 0.0)
        assert (site.status(), site.reasons()) == ("degraded", {"disk_stalled"})
        assert site.http.get("/health/live").status_code == 200
        assert text_of(site.chat(PROMPT.format("ada"), agent="ada"))
        watches = [thread for thread in threading.enumerate() if thread.name == "disk-watch"]
        assert len(watches) == 1, "however often it is asked"
        gate.open()
    watches[0].join(20)
    site.until_well()


def test_a_block_file_that_cannot_be_opened_is_no_damaged_one(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor is left: the block is computed, and read again when there is one."""
    monkeypatch.setattr(loads, "_RETRY_READ_S", 0.05)
    site = serve()
    said = put_to_sleep(site, "ada")
    with monkeypatch.context() as patch:

        def exhausted(*_: object) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        patch.setattr(reader, "open_block", exhausted)
        assert wake(site, "ada")[0] == said["ada"]
        assert site.metric("dormouse_store_quarantined_blocks_total") == 0
    until_read(site, "ada")
    assert (site.status(), site.reasons()) == ("ok", set())


def test_descriptors_that_run_out_are_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_num_descriptors", lambda: (95, 100))
    assert (site.status(), site.reasons()) == ("degraded", {"descriptors_low"})
    monkeypatch.setattr(health, "_num_descriptors", lambda: (None, 100))
    assert (site.status(), site.reasons()) == ("degraded", {"descriptors_low"})
