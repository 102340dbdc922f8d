"""Rows into columns and back, in the order in which the catalog's tables have them."""

from __future__ import annotations

from typing import Any

from dormouse.domain.agents import AgentId
from dormouse.domain.blocks import BlockKey, Namespace
from dormouse.store.columns import Columns
from dormouse.store.rows import (
    AgentRow,
    BlockRow,
    CheckpointId,
    CheckpointRow,
    DocumentId,
    DocumentRow,
    ReplyId,
    ReplyRow,
)

AgentColumns = tuple[str, str, Namespace]


class RowCodec:
    """`columns` says what becomes of names and contents. What reads raises SealBroken."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    @property
    def generation(self) -> int:
        """Grows with every key that is made or destroyed; 0 where nothing is sealed."""
        return self._columns.generation

    def key(self, key: bytes) -> bytes:
        """The column of a key."""
        return self._columns.key(key)

    def block(self, row: BlockRow) -> tuple[object, ...]:
        """Table `blocks`."""
        key, parent = self._columns.key(row.key), self._columns.key(row.parent)
        tokens, checksum = self._columns.block(row.namespace, row.key, row.tokens, row.checksum)
        return key, row.namespace, parent, tokens, row.num_before, row.nbytes, checksum, row.used_at

    def to_block(
        self, key: bytes, namespace: Namespace, parent: bytes, tokens: bytes, num_before: int, *rest: Any
    ) -> BlockRow:
        """The inverse of `block`."""
        nbytes, checksum, used_at = rest
        name = self._columns.from_key(key)
        tokens, checksum = self._columns.from_block(namespace, name, tokens, checksum)
        before = self._columns.from_key(parent)
        return BlockRow(name, namespace, before, tokens, num_before, nbytes, checksum, used_at)

    def agent_id(self, id: AgentId) -> AgentColumns:
        """The primary key of table `agents`."""
        return self._columns.tenant(id.tenant), self._name(id, id.name, "agent"), id.namespace

    def agent(self, row: AgentRow) -> tuple[object, ...]:
        """Table `agents`."""
        who = self.agent_id(row.id)
        model, parent = (self._name(row.id, name, "model or parent") for name in (row.model, row.parent))
        rest = self._columns.content(row.id.tenant, row.rest, _rest_place(who))
        times = (row.num_tokens, row.created_at, row.used_at, row.pinned)
        return (
            *who,
            model,
            self._columns.key(row.tip),
            rest,
            *times,
            parent,
            row.parent_tokens,
            row.quota_nbytes,
        )

    def to_agent(
        self, tenant: str, name: str, namespace: Namespace, model: str, tip: bytes, rest: bytes, *state: Any
    ) -> AgentRow:
        """The inverse of `agent`."""
        num_tokens, created_at, used_at, pinned, parent, *numbers = state
        who = self._agent_id(tenant, name, namespace)
        return AgentRow(
            who,
            self._from_name(who, model, "model or parent"),
            self._columns.from_key(tip),
            self._columns.from_content(rest, _rest_place((tenant, name, namespace))),
            num_tokens,
            created_at,
            used_at,
            bool(pinned),
            self._from_name(who, parent, "model or parent"),
            *numbers,
        )

    def checkpoint_id(self, id: CheckpointId) -> tuple[str, str, Namespace, str]:
        """The primary key of table `checkpoints`."""
        return *self.agent_id(id.agent), self._name(id.agent, id.tag, "tag")

    def checkpoint(self, row: CheckpointRow) -> tuple[object, ...]:
        """Table `checkpoints`."""
        who = self.checkpoint_id(row.id)
        rest = self._columns.content(row.id.agent.tenant, row.rest, _rest_place(who))
        return *who, self._columns.key(row.tip), rest, row.num_tokens, row.created_at

    def to_checkpoint(
        self, tenant: str, name: str, namespace: Namespace, tag: str, tip: bytes, rest: bytes, *state: Any
    ) -> CheckpointRow:
        """The inverse of `checkpoint`."""
        agent = self._agent_id(tenant, name, namespace)
        content = self._columns.from_content(rest, _rest_place((tenant, name, namespace, tag)))
        who = CheckpointId(agent, self._from_name(agent, tag, "tag"))
        return CheckpointRow(who, self._columns.from_key(tip), content, *state)

    def to_doomed(self, key: bytes, namespace: Namespace) -> tuple[BlockKey, Namespace]:
        """A row of table `doomed`."""
        return self._columns.from_key(key), namespace

    def document_id(self, id: DocumentId) -> tuple[str, str, str]:
        """The primary key of table `documents`."""
        return (
            self._columns.tenant(id.tenant),
            id.kind,
            self._columns.name(id.tenant, id.id, _kind_place(id.kind)),
        )

    def document(self, id: DocumentId, row: DocumentRow) -> tuple[object, ...]:
        """Table `documents`."""
        who = self.document_id(id)
        return *who, self._columns.content(id.tenant, row.body, _body_place(who)), row.created_at, row.used_at

    def to_document_info(
        self, tenant: str, kind: str, id: str, created_at: float, used_at: float, nbytes: int
    ) -> tuple[DocumentId, float, float, int]:
        """All of a document but its body."""
        owner = self._columns.from_tenant(tenant)
        name = self._columns.from_name(owner, id, _kind_place(kind))
        return DocumentId(owner, kind, name), created_at, used_at, self._columns.content_nbytes(nbytes)

    def to_body(self, id: DocumentId, column: bytes) -> bytes:
        """The body of a document."""
        return self._columns.from_content(column, _body_place(self.document_id(id)))

    def reply(self, id: ReplyId, row: ReplyRow) -> tuple[object, ...]:
        """Table `replies`."""
        tokens = self._columns.reply(id.namespace, id.key, row.tokens)
        return id.namespace, self._columns.key(id.key), tokens, row.used_at

    def to_reply(
        self, namespace: Namespace, key: bytes, tokens: bytes, used_at: float
    ) -> tuple[ReplyId, ReplyRow]:
        """The inverse of `reply`."""
        name = bytes(self._columns.from_key(key))
        return ReplyId(namespace, name), ReplyRow(self._columns.from_reply(namespace, name, tokens), used_at)

    def _agent_id(self, tenant: str, name: str, namespace: Namespace) -> AgentId:
        owner = self._columns.from_tenant(tenant)
        return AgentId(owner, self._columns.from_name(owner, name, "agent"), namespace)

    def _name(self, id: AgentId, name: str, place: str) -> str:
        return self._columns.name(id.tenant, name, place)

    def _from_name(self, id: AgentId, column: str, place: str) -> str:
        return self._columns.from_name(id.tenant, column, place)


def _rest_place(who: tuple[str | Namespace, ...]) -> bytes:
    """Of the tokens after an agent's or checkpoint's last block."""
    return b"rest\0" + b"\0".join(part if isinstance(part, bytes) else part.encode() for part in who)


def _kind_place(kind: str) -> str:
    return f"document {kind}"


def _body_place(who: tuple[str, str, str]) -> bytes:
    return b"body\0" + "\0".join(who).encode()
