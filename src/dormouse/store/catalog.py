"""The catalog: SQLite, written by one thread, one transaction per `Change`."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

from dormouse.domain.blocks import BlockKey, Namespace
from dormouse.domain.errors import (
    DamagedCatalog,
    EncryptionMismatch,
    SealBroken,
    StoreError,
    StoreTooNew,
)
from dormouse.store.file_ops import FileOps
from dormouse.store.layout import FILE_MODE, VAULT_NAME
from dormouse.store.migrations import MIGRATIONS
from dormouse.store.row_codec import RowCodec
from dormouse.store.rows import (
    AgentRow,
    BlockRow,
    Change,
    CheckpointRow,
    DocumentId,
    ReplyId,
    ReplyRow,
)
from dormouse.store.vault import KEY_ID_NBYTES

T = TypeVar("T")

log = logging.getLogger(__name__)

WAL_LIMIT_NBYTES = 1 << 20
"""A longer write-ahead log is folded into the database; small, because it counts against the quota."""

BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

USED = ("blocks", "agents", "documents", "replies")
"""Tables whose rows have the time of their last use."""

_PULL_BACK = """UPDATE {table} SET used_at = ? + 1e-6 * ahead.number FROM (
    SELECT rowid AS id, row_number() OVER (ORDER BY used_at) AS number FROM {table} WHERE used_at > ?
) AS ahead WHERE {table}.rowid = ahead.id"""


class Catalog:
    """The database of one data folder. One thread at a time; methods raise sqlite3.Error."""

    def __init__(self, path: Path, ops: FileOps, rows: RowCodec) -> None:
        """Open or create, and migrate. `rows` says what the columns hold.

        Raises DamagedCatalog when SQLite cannot make sense of the file, and sqlite3.Error when the disk does
        not let it. Whoever opens calls `refuse_newer` before.
        """
        self._path = path
        self._ops = ops
        self._rows = rows
        self.findings: list[str] = []
        """What reading found that people should know."""
        path.touch(mode=FILE_MODE)
        # The opening thread hands the connection to the writer thread, and takes it back at close.
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            with _damage():
                _lock_exclusively(self._connection)
                _use_write_ahead_log(self._connection)
                _sync_every_commit(self._connection)
                _checkpoint_by_hand(self._connection)
                _forget_deleted_content(self._connection)
                _check_structure(self._connection)
                _read_any_text(self._connection)
                self._generation = self._check_generation()
                self._migrate()
        except BaseException:
            self._connection.close()
            raise
        self._identity = _identity(path)

    @property
    def is_in_place(self) -> bool:
        """Whether the file that is open still has its name. For any thread."""
        try:
            return _identity(self._path) == self._identity
        except OSError:
            return False

    @contextmanager
    def atomic(self) -> Iterator[sqlite3.Connection]:
        """One transaction, the only way to write: all of it is committed, or none on any exception."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._ops.commit(self._connection)
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def apply(self, change: Change) -> None:
        """Commit `change`; it is on disk on return. Raises DamagedCatalog too, and StoreError for values
        that SQLite cannot hold."""
        try:
            with _damage(), self.atomic() as connection:
                _write_blocks(connection, change, self._rows)
                _write_agents(connection, change, self._rows)
                _write_checkpoints(connection, change, self._rows)
                _write_doomed(connection, change, self._rows)
                _write_documents(connection, change, self._rows)
                _write_replies(connection, change, self._rows)
                generation = self._rows.generation
                if generation != self._generation:
                    connection.execute(f"PRAGMA user_version = {generation}")
            self._generation = generation
        except (UnicodeError, OverflowError) as error:
            raise StoreError(f"the catalog cannot hold a value: {error}; nothing was written") from error

    def pull_back(self, now: float) -> None:
        """Set uses that are ahead of `now` (Unix seconds) to it, in their order.

        A clock that was ahead would keep what was used then until that time comes, in place of what is
        used now. Raises DamagedCatalog.
        """
        with _damage():
            ahead = [table for table in USED if self._is_ahead(table, now)]
            if ahead:
                with self.atomic() as connection:
                    for table in ahead:
                        connection.execute(_PULL_BACK.format(table=table), (now, now))
                log.warning(
                    "the clock was set back: uses after it are taken for the newest (%s)", ", ".join(ahead)
                )

    def _is_ahead(self, table: str, now: float) -> bool:
        query = f"SELECT EXISTS (SELECT 1 FROM {table} WHERE used_at > ?)"
        return bool(self._connection.execute(query, (now,)).fetchone()[0])

    def blocks(self) -> list[BlockRow]:
        """All block rows. Raises DamagedCatalog."""
        query = "SELECT key, namespace, parent, tokens, num_before, nbytes, checksum, used_at FROM blocks"
        return self._read(query, self._rows.to_block)

    def agents(self) -> list[AgentRow]:
        """All agent rows. Raises DamagedCatalog."""
        query = (
            "SELECT tenant, name, namespace, model, tip, rest, num_tokens, created_at, used_at, pinned,"
            " parent, parent_tokens, quota_nbytes FROM agents"
        )
        return self._read(query, self._rows.to_agent)

    def checkpoints(self) -> list[CheckpointRow]:
        """All checkpoint rows. Raises DamagedCatalog."""
        query = "SELECT tenant, name, namespace, tag, tip, rest, num_tokens, created_at FROM checkpoints"
        return self._read(query, self._rows.to_checkpoint)

    def doomed(self) -> dict[BlockKey, Namespace]:
        """Blocks whose files were to go. Raises DamagedCatalog."""
        return dict(self._read("SELECT key, namespace FROM doomed", self._rows.to_doomed))

    def documents(self) -> list[tuple[DocumentId, float, float, int]]:
        """Every document's id, creation, last use (Unix seconds) and size. Raises DamagedCatalog."""
        query = "SELECT tenant, kind, id, created_at, used_at, length(body) FROM documents"
        return self._read(query, self._rows.to_document_info)

    def document(self, id: DocumentId) -> bytes | None:
        """The body of a document. Raises DamagedCatalog, and SealBroken for one that does not open."""
        query = "SELECT body FROM documents WHERE tenant = ? AND kind = ? AND id = ?"
        with _damage():
            row = self._connection.execute(query, self._rows.document_id(id)).fetchone()
        return None if row is None else self._rows.to_body(id, bytes(row[0]))

    def replies(self) -> list[tuple[ReplyId, ReplyRow]]:
        """Every remembered reply. Raises DamagedCatalog."""
        return self._read("SELECT namespace, key, tokens, used_at FROM replies", self._rows.to_reply)

    def purge(self, key_ids: Iterable[bytes]) -> None:
        """Remove all rows of encrypted tenants whose keys, of these ids, were destroyed."""
        ids = list(key_ids)
        if not ids:
            return
        with self.atomic() as connection:
            for table in ("agents", "checkpoints", "documents"):
                connection.executemany(
                    f"DELETE FROM {table} WHERE tenant = ?", [(key_id.hex(),) for key_id in ids]
                )
            for table in ("blocks", "replies"):
                connection.executemany(
                    f"DELETE FROM {table} WHERE substr(tokens, 1, {KEY_ID_NBYTES}) = ?",
                    [(key_id,) for key_id in ids],
                )

    def _read(self, query: str, to_row: Callable[..., T]) -> list[T]:
        """All rows of a query; those that do not open are left out, and where they are."""
        with _damage():
            columns = self._connection.execute(query).fetchall()
        rows = []
        broken: SealBroken | None = None
        for values in columns:
            try:
                rows.append(to_row(*values))
            except SealBroken as error:
                broken = error
        if broken is not None:
            what = f"{len(columns) - len(rows)} of {len(columns)} rows do not open: {broken}"
            log.error("catalog: %s (%s)", what, query)
            self.findings.append(f"the catalog is damaged or was changed: {what}")
        return rows

    def trim(self, limit_nbytes: int = WAL_LIMIT_NBYTES) -> None:
        """Fold a write-ahead log of more than `limit_nbytes` into the database.

        Never raises: everything is committed already, and a log that stays is folded by a later call.
        """
        try:
            if self._path.with_name(f"{self._path.name}-wal").stat().st_size > limit_nbytes:
                self._ops.fold(self._connection)
        except (sqlite3.Error, OSError) as error:
            log.warning("catalog: the write-ahead log was not folded in: %s", error)

    def close(self) -> None:
        """Close; SQLite folds the write-ahead log into the database. A second call does nothing."""
        self._connection.close()

    def _check_generation(self) -> int:
        """Of the keys that rows were last sealed with. Raises EncryptionMismatch when they are not given."""
        (found,) = self._connection.execute("PRAGMA user_version").fetchone()
        if found > self._rows.generation:
            raise EncryptionMismatch(
                f"{VAULT_NAME} is older than {self._path} and lacks what happened to keys since; bring back "
                "its newest copy. Nothing was changed"
            )
        return int(found)

    def _migrate(self) -> None:
        with self.atomic() as connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS migrations (name TEXT PRIMARY KEY, applied_at REAL) STRICT"
            )
        applied = _applied(self._connection)
        names = [migration.__name__ for migration in MIGRATIONS]
        if applied != set(names[: len(applied)]):
            raise DamagedCatalog(
                f"catalog cannot be read: it is of no version ({', '.join(sorted(applied))})"
            )
        for migration in MIGRATIONS:
            if migration.__name__ not in applied:
                with self.atomic() as connection:
                    migration(connection)
                    connection.execute(
                        "INSERT INTO migrations VALUES (?, ?)", (migration.__name__, time.time())
                    )


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def refuse_newer(path: Path) -> None:
    """Raise StoreTooNew for a catalog with migrations that we do not have, and leave every file as it is."""
    if not path.exists():
        return
    beside = [path.with_name(f"{path.name}{suffix}") for suffix in ("-wal", "-shm")]
    made = [file for file in beside if not file.exists()]  # by SQLite, which reads no log without them
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            applied = _applied(connection)
    except (sqlite3.Error, UnicodeDecodeError):
        return  # New, damaged or on a bad disk: opening it for writing tells which.
    finally:
        for file in made:
            file.unlink(missing_ok=True)
    known = {migration.__name__ for migration in MIGRATIONS}
    unknown = applied - known
    if unknown and applied > known:  # without all of ours it is no newer one, but damaged
        raise StoreTooNew(
            f"{path} was written by a newer version (it has {', '.join(sorted(unknown))}); "
            "upgrade Dormouse or choose another data folder. Nothing was changed"
        )


def _applied(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM migrations")}


@contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in BROKEN:
            raise DamagedCatalog(f"catalog cannot be read: {error}") from error
        raise
    except UnicodeDecodeError as error:  # SQLite's own words, with something of the file in them
        raise DamagedCatalog(f"catalog cannot be read: {error}") from error


def _lock_exclusively(connection: sqlite3.Connection) -> None:
    # The folder has one owner anyway; without sharing there is no -shm file to keep or to fail on.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    # One fsync per commit instead of two or three.
    connection.execute("PRAGMA journal_mode = WAL").fetchall()


def _sync_every_commit(connection: sqlite3.Connection) -> None:
    # NORMAL could lose the last commits in a power cut, and an agent was told that it is durable.
    connection.execute("PRAGMA synchronous = FULL")


def _checkpoint_by_hand(connection: sqlite3.Connection) -> None:
    # Automatic checkpoints leave the log at its largest size; ours truncate it.
    connection.execute("PRAGMA wal_autocheckpoint = 0").fetchall()


def _forget_deleted_content(connection: sqlite3.Connection) -> None:
    # The tokens of a deleted agent are text: they go from the file, not only from the tables.
    connection.execute("PRAGMA secure_delete = ON").fetchall()


def _check_structure(connection: sqlite3.Connection) -> None:
    # Every row is read next in any case; a broken tree must be found now, not by a later write.
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise DamagedCatalog(f"catalog cannot be read: {verdict}")


def _read_any_text(connection: sqlite3.Connection) -> None:
    # One damaged name must not cost all others theirs.
    connection.text_factory = lambda text: text.decode(errors="replace")


def _write_blocks(connection: sqlite3.Connection, change: Change, rows: RowCodec) -> None:
    connection.executemany(
        """INSERT INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET
            namespace = excluded.namespace, parent = excluded.parent, tokens = excluded.tokens,
            num_before = excluded.num_before, nbytes = excluded.nbytes,
            checksum = excluded.checksum, used_at = excluded.used_at""",
        [rows.block(row) for row in change.rows.values()],
    )
    connection.executemany("DELETE FROM blocks WHERE key = ?", [(rows.key(k),) for k in change.removed])
    connection.executemany(
        "UPDATE blocks SET used_at = ? WHERE key = ?",
        [(at, rows.key(key)) for key, at in change.used.items()],
    )


def _write_agents(connection: sqlite3.Connection, change: Change, rows: RowCodec) -> None:
    connection.executemany(
        "DELETE FROM agents WHERE tenant = ? AND name = ? AND namespace = ?",
        [rows.agent_id(gone) for gone in change.removed_agents],
    )
    connection.executemany(
        "INSERT OR REPLACE INTO agents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [rows.agent(agent) for agent in change.agents.values()],
    )


def _write_checkpoints(connection: sqlite3.Connection, change: Change, rows: RowCodec) -> None:
    connection.executemany(
        "DELETE FROM checkpoints WHERE tenant = ? AND name = ? AND namespace = ? AND tag = ?",
        [rows.checkpoint_id(gone) for gone in change.removed_checkpoints],
    )
    connection.executemany(
        "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [rows.checkpoint(checkpoint) for checkpoint in change.checkpoints.values()],
    )


def _write_doomed(connection: sqlite3.Connection, change: Change, rows: RowCodec) -> None:
    connection.executemany("DELETE FROM doomed WHERE key = ?", [(rows.key(k),) for k in change.unlinked])
    connection.executemany(
        "INSERT OR REPLACE INTO doomed VALUES (?, ?)",
        [(rows.key(key), namespace) for key, namespace in change.doomed.items()],
    )


def _write_documents(connection: sqlite3.Connection, change: Change, rows: RowCodec) -> None:
    connection.executemany(
        "UPDATE documents SET used_at = ? WHERE tenant = ? AND kind = ? AND id = ?",
        [(at, *rows.document_id(one)) for one, at in change.used_documents.items()],
    )
    connection.executemany(
        "DELETE FROM documents WHERE tenant = ? AND kind = ? AND id = ?",
        [rows.document_id(one) for one, row in change.documents.items() if row is None],
    )
    connection.executemany(
        "INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?, ?, ?)",
        [rows.document(one, row) for one, row in change.documents.items() if row is not None],
    )


def _write_replies(connection: sqlite3.Connection, change: Change, rows: RowCodec) -> None:
    connection.executemany(
        "DELETE FROM replies WHERE namespace = ? AND key = ?",
        [(one.namespace, rows.key(one.key)) for one, row in change.replies.items() if row is None],
    )
    connection.executemany(
        "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)",
        [rows.reply(one, row) for one, row in change.replies.items() if row is not None],
    )
