"""The catalog's schema: an append-only list. A released migration is never edited, only followed."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable


def create_blocks(connection: sqlite3.Connection) -> None:
    """Blocks by key; `nbytes` 0 means that only the history is known."""
    connection.execute(
        """CREATE TABLE blocks (
            key BLOB PRIMARY KEY,
            namespace BLOB NOT NULL,
            parent BLOB NOT NULL,
            tokens BLOB NOT NULL,
            num_before INTEGER NOT NULL,
            nbytes INTEGER NOT NULL,
            checksum TEXT NOT NULL,
            used_at REAL NOT NULL
        ) STRICT"""
    )


def create_agents(connection: sqlite3.Connection) -> None:
    """Agents by tenant, name and namespace; each refers to the last block of its chain."""
    connection.execute(
        """CREATE TABLE agents (
            tenant TEXT NOT NULL,
            name TEXT NOT NULL,
            namespace BLOB NOT NULL,
            model TEXT NOT NULL,
            tip BLOB NOT NULL,
            rest BLOB NOT NULL,
            num_tokens INTEGER NOT NULL,
            created_at REAL NOT NULL,
            used_at REAL NOT NULL,
            pinned INTEGER NOT NULL,
            PRIMARY KEY (tenant, name, namespace)
        ) STRICT"""
    )


def create_doomed(connection: sqlite3.Connection) -> None:
    """Files to unlink: their rows are gone or history only, the unlink may not have happened yet."""
    connection.execute(
        "CREATE TABLE doomed (key BLOB PRIMARY KEY, namespace BLOB NOT NULL) STRICT, WITHOUT ROWID"
    )


def create_documents(connection: sqlite3.Connection) -> None:
    """Bodies by tenant, kind and id: stored responses, what agents were made with, their transcripts."""
    connection.execute(
        """CREATE TABLE documents (
            tenant TEXT NOT NULL,
            kind TEXT NOT NULL,
            id TEXT NOT NULL,
            body BLOB NOT NULL,
            created_at REAL NOT NULL,
            used_at REAL NOT NULL,
            PRIMARY KEY (tenant, kind, id)
        ) STRICT"""
    )


def create_replies(connection: sqlite3.Connection) -> None:
    """Tokens of replies by what they look like as text, so that a replayed reply is the same tokens."""
    connection.execute(
        """CREATE TABLE replies (
            namespace BLOB NOT NULL,
            key BLOB NOT NULL,
            tokens BLOB NOT NULL,
            used_at REAL NOT NULL,
            PRIMARY KEY (namespace, key)
        ) STRICT"""
    )


def create_checkpoints(connection: sqlite3.Connection) -> None:
    """States of agents that were given a name; each refers to a block, as the agent did."""
    connection.execute(
        """CREATE TABLE checkpoints (
            tenant TEXT NOT NULL,
            name TEXT NOT NULL,
            namespace BLOB NOT NULL,
            tag TEXT NOT NULL,
            tip BLOB NOT NULL,
            rest BLOB NOT NULL,
            num_tokens INTEGER NOT NULL,
            created_at REAL NOT NULL,
            PRIMARY KEY (tenant, name, namespace, tag)
        ) STRICT"""
    )


def add_lineage_and_quota(connection: sqlite3.Connection) -> None:
    """Which agent an agent was forked from, after how many tokens; how many bytes it may have, 0 for any."""
    for column in ("parent TEXT NOT NULL DEFAULT ''", "parent_tokens INTEGER NOT NULL DEFAULT 0"):
        connection.execute(f"ALTER TABLE agents ADD COLUMN {column}")
    connection.execute("ALTER TABLE agents ADD COLUMN quota_nbytes INTEGER NOT NULL DEFAULT 0")


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (
    create_blocks,
    create_agents,
    create_doomed,
    create_documents,
    create_replies,
    create_checkpoints,
    add_lineage_and_quota,
)
