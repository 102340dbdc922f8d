"""Start-up: whatever is on disk, the store opens, keeps what is good and says what is not."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tests.store.kit import (
    NAMESPACE,
    FailingOps,
    OpenStore,
    agent_id,
    assert_loads,
    block_files,
    block_path,
    links_of,
    load,
    nbytes_below,
    put_all,
    reply,
    save,
)

from dormouse.domain.blocks import BlockKey, Link
from dormouse.domain.errors import BlockMissing, DamagedBlock, StoreError, StoreTooNew


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def stored(open_store: OpenStore) -> list[Link]:
    """Ada, 40 tokens in three blocks, in a folder that nobody owns."""
    store = open_store()
    links = reply(store, "ada", range(40))
    store.close()
    return links


@pytest.mark.parametrize("position", [0, 30, 4000, 4096, 5000, -60, -1])
def test_a_flipped_bit_costs_time_and_no_text(
    open_store: OpenStore, folder: Path, stored: list[Link], position: int
) -> None:
    flip(block_path(folder, stored[1].key), position)
    store = open_store()
    assert store.contains(stored[1].key)
    error, _ = load(store, stored[1].key)
    assert isinstance(error, DamagedBlock)
    assert not store.contains(stored[1].key)
    assert store.stats().counts["damaged"] == 1
    assert store.flush()
    assert len(list((folder / "quarantine").iterdir())) == 1
    assert store.history(agent_id("ada")) == list(range(40))
    assert store.agent("acme", "ada").durable_tokens == 16
    put_all(store, [stored[1]])
    assert store.flush()
    assert_loads(store, stored)
    assert store.agent("acme", "ada").durable_tokens == 40
    assert store.stats().nbytes == nbytes_below(folder)


def test_verify_finds_every_flipped_bit_and_is_clean_after(
    open_store: OpenStore, folder: Path, stored: list[Link]
) -> None:
    flip(block_path(folder, stored[0].key), 5000)
    flip(block_path(folder, stored[2].key), -1)
    block_path(folder, stored[1].key).unlink()
    store = open_store()
    report = store.verify()
    assert set(report.damaged) == {stored[0].key, stored[2].key}
    assert not report.is_clean
    assert store.verify().is_clean
    assert store.history(agent_id("ada")) == list(range(40))


@pytest.mark.parametrize(("number", "is_damage"), [(errno.EIO, True), (errno.EMFILE, False)])
def test_an_unreadable_sector_is_damage_and_a_lack_of_descriptors_is_not(
    open_store: OpenStore, stored: list[Link], monkeypatch: pytest.MonkeyPatch, number: int, is_damage: bool
) -> None:
    def fail(path: Path) -> int:
        raise OSError(number, "no", str(path))

    store = open_store()
    with monkeypatch.context() as patched:
        patched.setattr("dormouse.store.reader.open_block", fail)
        error, _ = load(store, stored[0].key)
    assert isinstance(error, OSError)
    assert error.errno == number
    assert store.contains(stored[0].key) != is_damage


def test_a_missing_file_found_at_start(open_store: OpenStore, folder: Path, stored: list[Link]) -> None:
    block_path(folder, stored[1].key).unlink()
    store = open_store()
    assert not store.contains(stored[1].key)
    assert store.stats().num_history_only == 1
    assert store.history(agent_id("ada")) == list(range(40))


def test_a_missing_file_found_at_load(open_store: OpenStore, folder: Path, stored: list[Link]) -> None:
    store = open_store()
    block_path(folder, stored[1].key).unlink()
    assert isinstance(load(store, stored[1].key)[0], DamagedBlock)
    assert isinstance(load(store, stored[1].key)[0], BlockMissing)
    assert store.flush()
    assert store.history(agent_id("ada")) == list(range(40))


def test_a_row_without_file_and_agent_goes(open_store: OpenStore, folder: Path) -> None:
    store = open_store()
    (link,) = links_of(range(16))
    put_all(store, [link])
    store.close()
    block_path(folder, link.key).unlink()
    assert open_store().stats().num_history_only == 0


def test_a_truncated_file_is_found_at_start(open_store: OpenStore, folder: Path, stored: list[Link]) -> None:
    os.truncate(block_path(folder, stored[1].key), 6000)
    store = open_store()
    assert not store.contains(stored[1].key)
    assert store.stats().quarantine_nbytes == 6000
    assert store.history(agent_id("ada")) == list(range(40))


def _foreign(path: Path) -> None:
    path.write_bytes(b"what is this")


def _link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [_foreign, _link, _pipe])
@pytest.mark.parametrize(
    "place",
    [
        "readme.txt",
        f"{NAMESPACE.hex()}/ab/{'ab' * 32}.safetensors",
        f"{NAMESPACE.hex()}/ab/{'cd' * 32}.safetensors",
        "deep/er/and/deeper/file",
    ],
)
def test_foreign_files_are_quarantined(
    open_store: OpenStore, folder: Path, stored: list[Link], make: Callable[[Path], None], place: str
) -> None:
    path = folder / "blocks" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    store = open_store()
    assert not os.path.lexists(path)
    assert len(list((folder / "quarantine").iterdir())) == 1
    assert_loads(store, stored)
    assert store.stats().nbytes == nbytes_below(folder)


def test_a_block_in_another_blocks_place_is_quarantined(
    open_store: OpenStore, folder: Path, stored: list[Link]
) -> None:
    block_path(folder, stored[0].key).replace(block_path(folder, stored[1].key))
    store = open_store()
    assert not store.contains(stored[0].key)
    error, _ = load(store, stored[1].key)
    assert isinstance(error, DamagedBlock), "sizes agree, so the load finds it"


def test_temp_files_are_removed(open_store: OpenStore, folder: Path, stored: list[Link]) -> None:
    temp = block_path(folder, stored[0].key).with_suffix(".tmp")
    temp.write_bytes(b"half a block")
    open_store()
    assert not temp.exists()
    assert not list((folder / "quarantine").iterdir())


def test_a_gone_catalog_is_rebuilt_from_files(
    open_store: OpenStore, folder: Path, stored: list[Link], caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "catalog.sqlite").unlink()
    store = open_store()
    assert_loads(store, stored)
    assert store.agents() == []
    assert "histories of agents are lost" in store.stats().notes[0]
    assert "histories of agents are lost" in caplog.text
    assert reply(store, "ada", range(40)) == stored
    assert store.agent("acme", "ada").durable_tokens == 40
    assert store.verify().is_clean


@pytest.mark.parametrize("damage", ["overwritten", "header", "page"])
def test_an_unreadable_catalog_is_set_aside_and_rebuilt(
    open_store: OpenStore, folder: Path, stored: list[Link], damage: str
) -> None:
    path = folder / "catalog.sqlite"
    data = bytearray(path.read_bytes())
    if damage == "overwritten":
        data[:] = b"\x00\x01not a database" * 1000
    elif damage == "header":
        data[:16] = bytes(16)
    else:
        data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)
    store = open_store()
    assert_loads(store, stored)
    assert store.stats().notes
    (kept,) = [p for p in (folder / "quarantine").iterdir() if p.name.endswith("catalog.sqlite")]
    assert kept.read_bytes() == data
    assert store.stats().nbytes == nbytes_below(folder)


def _edit(folder: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection, connection:
        connection.execute(statement, values)


def test_lost_histories_are_noted_even_when_there_are_no_blocks(open_store: OpenStore, folder: Path) -> None:
    store = open_store()
    assert save(store, "ada", links_of(range(40)))
    store.close()
    (folder / "catalog.sqlite").write_bytes(b"\x01" * 5000)
    assert "quarantine" in open_store().stats().notes[0]


def test_a_newer_version_is_left_untouched(open_store: OpenStore, folder: Path, stored: list[Link]) -> None:
    _edit(folder, "INSERT INTO migrations VALUES ('fly_to_the_moon', 1.0)")
    before = {
        path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".sqlite", ".safetensors")
    }
    with pytest.raises(StoreTooNew, match="fly_to_the_moon"):
        open_store()
    assert {path: path.read_bytes() for path in before} == before
    assert len(block_files(folder)) == len(stored)


def test_a_changed_row_is_healed_by_its_file(open_store: OpenStore, folder: Path, stored: list[Link]) -> None:
    _edit(folder, "UPDATE blocks SET tokens = x'00000000' WHERE key = ?", stored[1].key)
    store = open_store()
    assert store.history(agent_id("ada")) == list(range(40))
    assert_loads(store, stored)


def test_a_row_that_lost_its_parent_is_healed_before_anything_goes(
    open_store: OpenStore, folder: Path, stored: list[Link]
) -> None:
    block_path(folder, stored[0].key).unlink()
    _edit(folder, "UPDATE blocks SET parent = x'' WHERE key = ?", stored[1].key)
    assert open_store().history(agent_id("ada")) == list(range(40))


def test_a_changed_row_without_file_never_gives_wrong_text(
    open_store: OpenStore, folder: Path, stored: list[Link]
) -> None:
    for link in stored:
        block_path(folder, link.key).unlink()
    _edit(folder, "UPDATE blocks SET tokens = x'00000000' WHERE key = ?", stored[1].key)
    store = open_store()
    with pytest.raises(StoreError, match="tokens are lost"):
        store.history(agent_id("ada"))
    assert store.verify().broken_agents == (agent_id("ada"),)
    assert store.stats().num_history_only == 2, "what is left of the text stays"
    store.delete_agent("acme", "ada")


def test_a_deleted_block_does_not_come_back(open_store: OpenStore, folder: Path) -> None:
    ops = FailingOps()
    store = open_store(file_ops=ops)
    links = reply(store, "ada", range(40))
    ops.errors["unlink"] = OSError(5, "no unlink")
    store.delete_agent("acme", "ada")
    assert not store.contains(links[0].key)
    assert store.health()
    store.close()
    assert len(block_files(folder)) == 3
    store = open_store()
    assert block_files(folder) == set()
    assert store.stats().num_blocks == 0


def test_a_file_whose_unlink_failed_is_unlinked_later(open_store: OpenStore, folder: Path) -> None:
    ops = FailingOps()
    store = open_store(file_ops=ops)
    reply(store, "ada", range(40))
    ops.errors["unlink"] = OSError(5, "no unlink")
    store.delete_agent("acme", "ada")
    ops.errors.clear()
    reply(store, "bob", [9] * 16)
    assert store.flush()
    assert block_files(folder) == {links_of([9] * 16)[0].key.hex()}
    assert store.stats().nbytes == nbytes_below(folder)


def test_a_block_put_again_while_its_unlink_fails_stays(open_store: OpenStore) -> None:
    ops = FailingOps()
    store = open_store(file_ops=ops)
    reply(store, "ada", range(40))
    ops.errors["unlink"] = OSError(5, "no unlink")
    store.delete_agent("acme", "ada")
    links = reply(store, "ada", range(40))
    ops.errors.clear()
    reply(store, "bob", [9] * 16)
    store.close()
    store = open_store()
    assert_loads(store, links)


def test_adopted_blocks_know_their_place_in_the_chain(
    open_store: OpenStore, folder: Path, stored: list[Link]
) -> None:
    (folder / "catalog.sqlite").unlink()
    open_store().close()
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection:
        rows = connection.execute("SELECT key, num_before FROM blocks").fetchall()
    assert dict(rows) == {BlockKey(link.key): n * 16 for n, link in enumerate(stored)}


def test_quarantine_is_bounded_oldest_first(open_store: OpenStore, folder: Path) -> None:
    (folder / "blocks").mkdir(parents=True)
    for number in range(30):
        (folder / "blocks" / f"{number:02}.bin").write_bytes(bytes(100_000))
    store = open_store(quota_nbytes=10_000_000)
    assert store.stats().quarantine_nbytes == 1_000_000
    assert len(list((folder / "quarantine").iterdir())) == 10
    assert store.stats().nbytes == nbytes_below(folder)


def test_a_folder_that_cannot_be_used_says_so(folder: Path, open_store: OpenStore) -> None:
    folder.write_text("a file, not a folder")
    with pytest.raises(StoreError, match="cannot be used"):
        open_store()
