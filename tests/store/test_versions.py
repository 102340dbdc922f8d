"""Data folders of other versions: older ones are brought up to date, newer ones left exactly as they are."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tests.store.kit import FaultyOps, OpenStore, agent_id, assert_loads, block_path, links_of, reply, save

from dormouse.domain.errors import StoreError, StoreTooNew
from dormouse.store.migrations import MIGRATIONS


def everything_below(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder with its mode, and the bytes of files."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def newer_in_the_database(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection, connection:
        connection.execute("INSERT INTO migrations VALUES ('fly_to_the_moon', 1.0)")
        connection.execute("CREATE TABLE moon (phase TEXT)")


def newer_in_the_log(folder: Path) -> None:
    """As a newer version leaves it that was killed: its migration is in the write-ahead log alone."""
    path = folder / "catalog.sqlite"
    killed = folder.with_name("killed")
    killed.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        connection.execute("PRAGMA wal_autocheckpoint = 0").fetchall()
        newer_in_the_database(folder)
        for name in ("catalog.sqlite", "catalog.sqlite-wal"):
            shutil.copy(folder / name, killed / name)
    for name in ("catalog.sqlite", "catalog.sqlite-wal"):
        shutil.copy(killed / name, folder / name)
    with closing(sqlite3.connect(f"file:{path}?immutable=1", uri=True)) as connection:
        names = connection.execute("SELECT name FROM migrations").fetchall()
    assert ("fly_to_the_moon",) not in names, "the log was folded in"


@pytest.mark.parametrize("make_newer", [newer_in_the_database, newer_in_the_log])
def test_a_newer_folder_is_refused_and_every_byte_stays(
    open_store: OpenStore, folder: Path, make_newer: Callable[[Path], None]
) -> None:
    store = open_store()
    reply(store, "ada", range(40))
    store.close()
    make_newer(folder)
    (folder / "store.lock").write_text("4711\n")
    (folder / "blocks" / "what_newer_versions_keep_here").write_bytes(b"moon dust")
    folder.chmod(0o750)
    before = everything_below(folder)
    with pytest.raises(StoreTooNew, match=r"fly_to_the_moon.*Nothing was changed"):
        open_store()
    assert everything_below(folder) == before
    assert folder.stat().st_mode & 0o777 == 0o750


def test_a_block_of_a_newer_format_is_set_aside_and_kept(open_store: OpenStore, folder: Path) -> None:
    """Its name says what it should hold, not how: it is computed again in the format that is known."""
    store = open_store()
    links = reply(store, "ada", range(40))
    store.close()
    path = block_path(folder, links[1].key)
    path.write_bytes(path.read_bytes().replace(b'"format": "1"', b'"format": "2"', 1))
    (folder / "catalog.sqlite").unlink()
    store = open_store()
    assert not store.contains(links[1].key)
    (kept,) = (folder / "quarantine").iterdir()
    assert b'"format": "2"' in kept.read_bytes()
    reply(store, "ada", range(40))
    assert_loads(store, links)


@pytest.mark.parametrize("num_applied", range(len(MIGRATIONS)))
def test_a_catalog_of_any_older_version_is_brought_up_to_date(
    open_store: OpenStore, folder: Path, num_applied: int
) -> None:
    """Also one whose migration was interrupted: each is committed with its record, so it is one of these."""
    folder.mkdir(mode=0o700)
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE migrations (name TEXT PRIMARY KEY, applied_at REAL) STRICT")
        for migration in MIGRATIONS[:num_applied]:
            migration(connection)
            connection.execute("INSERT INTO migrations VALUES (?, 1.0)", (migration.__name__,))
        if num_applied >= 2:
            (link,) = links_of(range(16))
            connection.execute(
                "INSERT INTO blocks VALUES (?, ?, x'', ?, 0, 0, '', 1.0)",
                (link.key, agent_id("ada").namespace, bytes(b for n in range(16) for b in (n, 0, 0, 0))),
            )
            connection.execute(
                "INSERT INTO agents (tenant, name, namespace, model, tip, rest, num_tokens, created_at,"
                " used_at, pinned) VALUES ('acme', 'ada', ?, 'toy', ?, x'', 16, 1.0, 1.0, 0)",
                (agent_id("ada").namespace, link.key),
            )
    store = open_store()
    if num_applied >= 2:
        assert store.history(agent_id("ada")) == list(range(16))
        store.admin.tag("acme", "ada", "old")
    reply(store, "ada", range(40))
    store.close()
    assert open_store().history(agent_id("ada")) == list(range(40))


@pytest.mark.parametrize("fails_at", range(len(MIGRATIONS) + 1))
def test_a_migration_that_the_disk_interrupts_goes_on_at_the_next_start(
    open_store: OpenStore, folder: Path, fails_at: int
) -> None:
    commits = []

    def fail(step: str, _: object) -> None:
        if step == "commit":
            commits.append(step)
            if len(commits) > fails_at:
                raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(StoreError, match="disk I/O error"):
        open_store(file_ops=FaultyOps(fail))
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    assert ("migrations" in tables) == (fails_at > 0)
    store = open_store()
    assert save(store, "ada", [], rest=[1])
    assert store.history(agent_id("ada")) == [1]
