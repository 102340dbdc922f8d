"""Rows of the catalog, and a change to it as one value: planned, committed, then mirrored in the index."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from dormouse.domain.agents import AgentId
from dormouse.domain.blocks import BlockKey, Link, Namespace, unpack_tokens
from dormouse.store.files import TOKEN_NBYTES


@dataclass(slots=True)
class BlockRow:
    """One block. `tokens` are packed; `num_before` counts the tokens of its chain before it, as far as known.

    `nbytes` is the size of its file, 0 when only its history is known. Never changed once in the index,
    but for `used_at` (Unix seconds), which the view touches.
    """

    key: BlockKey
    namespace: Namespace
    parent: BlockKey
    tokens: bytes
    num_before: int
    nbytes: int
    checksum: str
    used_at: float

    @property
    def num_tokens(self) -> int:
        """Tokens of this block."""
        return len(self.tokens) // TOKEN_NBYTES

    @property
    def end(self) -> int:
        """Tokens of the chain up to and with this block."""
        return self.num_before + self.num_tokens

    @property
    def link(self) -> Link:
        """The block by name and content."""
        return Link(self.key, self.parent, tuple(unpack_tokens(self.tokens)))

    def without_payload(self) -> BlockRow:
        """The same block as history only."""
        return replace(self, nbytes=0, checksum="")


@dataclass(frozen=True, slots=True)
class AgentRow:
    """One agent. `tip` is ROOT when its history is shorter than a stored block; `rest` tokens are packed."""

    id: AgentId
    model: str
    tip: BlockKey
    rest: bytes
    num_tokens: int
    created_at: float
    used_at: float
    pinned: bool
    parent: str = ""
    parent_tokens: int = 0
    quota_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class CheckpointId:
    """A checkpoint's agent, and its name there."""

    agent: AgentId
    tag: str


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """One checkpoint; `tip` and `rest` are those that its agent had."""

    id: CheckpointId
    tip: BlockKey
    rest: bytes
    num_tokens: int
    created_at: float


@dataclass(frozen=True, slots=True)
class DocumentId:
    """A document's tenant, kind and name within them."""

    tenant: str
    kind: str
    id: str


AGENT_KINDS = ("agent", "transcript", "why")
"""Documents whose id is the name of an agent. They go with it."""

CHECKPOINT_KIND = "checkpoint"
"""The transcript as it was at a checkpoint."""


def checkpoint_document(tenant: str, name: str, tag: str) -> DocumentId:
    """The document of a checkpoint. Neither name nor tag holds a line break."""
    return DocumentId(tenant, CHECKPOINT_KIND, f"{name}\n{tag}")


def agent_documents(tenant: str, name: str, tags: Iterable[str]) -> list[DocumentId]:
    """All documents of an agent and its checkpoints."""
    own = [DocumentId(tenant, kind, name) for kind in AGENT_KINDS]
    return [*own, *(checkpoint_document(tenant, name, tag) for tag in tags)]


@dataclass(frozen=True, slots=True, eq=False)
class DocumentRow:
    """One document. Times are Unix seconds."""

    body: bytes
    created_at: float
    used_at: float


@dataclass(frozen=True, slots=True)
class ReplyId:
    """Under what a reply is remembered."""

    namespace: Namespace
    key: bytes


@dataclass(frozen=True, slots=True, eq=False)
class ReplyRow:
    """The packed tokens of a reply. `used_at` is in Unix seconds."""

    tokens: bytes
    used_at: float


@dataclass(slots=True)
class Change:
    """What one transaction does. A key is in `rows` or in `removed`, never in both.

    Documents and replies that are None are deleted. With `wipe` the doomed files are overwritten first.

    `doomed` are blocks whose files go once this is committed. They are recorded in the same transaction,
    so that a crash before the unlink does not bring deleted content back; `unlinked` ones are forgotten.
    """

    rows: dict[BlockKey, BlockRow] = field(default_factory=dict)
    removed: dict[BlockKey, BlockRow] = field(default_factory=dict)
    agents: dict[AgentId, AgentRow] = field(default_factory=dict)
    removed_agents: set[AgentId] = field(default_factory=set)
    checkpoints: dict[CheckpointId, CheckpointRow] = field(default_factory=dict)
    removed_checkpoints: set[CheckpointId] = field(default_factory=set)
    used: dict[BlockKey, float] = field(default_factory=dict)
    doomed: dict[BlockKey, Namespace] = field(default_factory=dict)
    unlinked: set[BlockKey] = field(default_factory=set)
    documents: dict[DocumentId, DocumentRow | None] = field(default_factory=dict)
    used_documents: dict[DocumentId, float] = field(default_factory=dict)
    replies: dict[ReplyId, ReplyRow | None] = field(default_factory=dict)
    wipe: bool = False

    @property
    def num_rows(self) -> int:
        """Rows that the transaction touches, for estimating how the catalog grows."""
        parts = (self.rows, self.removed, self.agents, self.removed_agents, self.used, self.doomed)
        notes = (self.documents, self.used_documents, self.replies)
        tags = (self.checkpoints, self.removed_checkpoints)
        return sum(len(part) for part in (*parts, *tags, *notes))

    def remove(self, row: BlockRow) -> None:
        """Forget the block, and its file if it has one."""
        self.removed[row.key] = row
        self._doom(row)

    def evict(self, row: BlockRow) -> None:
        """Keep the block's history and drop its file."""
        self.rows[row.key] = row.without_payload()
        self._doom(row)

    def _doom(self, row: BlockRow) -> None:
        if row.nbytes:
            self.doomed[row.key] = row.namespace
