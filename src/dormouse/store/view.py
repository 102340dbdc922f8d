"""What callers see: the committed index, and over it what is on its way to it. One short lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from threading import Lock

from dormouse.domain.agents import Agent, AgentId, AgentUpdate, Checkpoint
from dormouse.domain.blocks import ROOT, BlockKey, Link, Namespace, unpack_tokens
from dormouse.domain.errors import AgentNotFound, StoreError
from dormouse.store.files import BlockFormat
from dormouse.store.index import Head, Index, head_of
from dormouse.store.rows import AgentRow, BlockRow, Change, CheckpointRow


@dataclass(slots=True)
class PendingBlock:
    """A block that was put and is not committed yet."""

    namespace: Namespace
    link: Link
    tokens: bytes
    payload: bytes
    format: BlockFormat
    used_at: float


@dataclass(frozen=True, slots=True, eq=False)
class UnsavedAgent:
    """An agent update that is not committed yet. `saved_at` is in Unix seconds."""

    update: AgentUpdate
    rest: bytes
    saved_at: float
    on_durable: Callable[[bool], None] | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An agent's rows at one moment; `blocks` are in no order."""

    agent: AgentRow
    checkpoints: tuple[CheckpointRow, ...]
    blocks: Mapping[BlockKey, BlockRow]


class StoreView:
    """Answers from memory for any thread. Blocks and agents on their way count as there.

    | state                 | enters by        | leaves by                                  |
    | --------------------- | ---------------- | ------------------------------------------ |
    | pending block         | `offer`          | `apply` (committed) or `drop` (no room)    |
    | damaged payload       | `mark_damaged`   | `apply` of a change to that block          |
    | unsaved agent         | `save`           | `saved` (committed or deleted)             |
    | touched, not recorded | `touch`          | `take_touched`                             |
    """

    def __init__(self, index: Index, max_pending_nbytes: int) -> None:
        self._lock = Lock()
        self._index = index
        self._max_pending_nbytes = max_pending_nbytes
        self._pending: dict[BlockKey, PendingBlock] = {}
        self._pending_heads: dict[Head, list[PendingBlock]] = {}
        self._pending_nbytes = 0
        self._damaged: set[BlockKey] = set()
        self._unsaved: dict[AgentId, UnsavedAgent] = {}
        self._touched: set[BlockKey] = set()

    @property
    def pending(self) -> tuple[int, int]:
        """How many blocks wait to be written, and their payload bytes."""
        return len(self._pending), self._pending_nbytes

    @property
    def num_unsaved(self) -> int:
        """How many agents have an update that is not committed."""
        return len(self._unsaved)

    def contains(self, key: BlockKey) -> bool:
        """Whether the block's KV can be loaded: on disk, or waiting to be written."""
        with self._lock:
            return key in self._pending or self._has_payload(key)

    def has_durable(self, key: BlockKey) -> bool:
        """Whether the block's KV is on disk and its row committed."""
        with self._lock:
            return self._has_payload(key)

    def children(self, namespace: Namespace, parent: BlockKey, first_token: bytes) -> list[Link]:
        """Loadable blocks that continue `parent` with `first_token` (packed)."""
        head = (namespace, parent, first_token)
        with self._lock:
            rows = [row for row in self._index.at_head(head) if row.key not in self._damaged]
            pending = list(self._pending_heads.get(head, ()))
        links = {row.key: row.link for row in rows}
        links.update((block.link.key, block.link) for block in pending)
        return list(links.values())

    def find(self, key: BlockKey) -> PendingBlock | BlockRow | None:
        """Where to load the block from; None when its payload is nowhere."""
        with self._lock:
            if key in self._pending:
                return self._pending[key]
            return self._index.blocks[key] if self._has_payload(key) else None

    def offer(self, block: PendingBlock) -> bool | None:
        """Accept a block to be written: True. False when the queue is full, None when it is here already."""
        key = block.link.key
        with self._lock:
            if key in self._pending or self._has_payload(key):
                return None
            if self._pending_nbytes + len(block.payload) > self._max_pending_nbytes:
                return False
            self._pending[key] = block
            self._pending_heads.setdefault(_head(block), []).append(block)
            self._pending_nbytes += len(block.payload)
            return True

    def drop(self, keys: Iterable[BlockKey]) -> None:
        """Forget pending blocks that will not be written; they may be offered again."""
        with self._lock:
            self._drop(keys)

    def mark_damaged(self, row: BlockRow) -> bool:
        """The file of `row` is bad: count its payload as absent. False when the row is out of date."""
        with self._lock:
            if self._index.blocks.get(row.key) is not row or row.key in self._damaged:
                return False
            self._damaged.add(row.key)
            return True

    def touch(self, keys: Iterable[BlockKey], now: float) -> bool:
        """The blocks were used at `now` (Unix seconds). Whether there was nothing to record before."""
        with self._lock:
            is_first = not self._touched
            for key in keys:
                if key in self._pending:
                    self._pending[key].used_at = now
                row = self._index.blocks.get(key)
                if row is not None:
                    row.used_at = now
                    self._touched.add(key)
            return is_first

    @property
    def has_touched(self) -> bool:
        """Whether uses wait to be recorded."""
        return bool(self._touched)

    def take_touched(self) -> dict[BlockKey, float]:
        """Uses to record, each once."""
        with self._lock:
            keys, self._touched = self._touched, set()
            blocks = self._index.blocks
            return {key: blocks[key].used_at for key in keys if key in blocks}

    def touch_again(self, keys: Iterable[BlockKey]) -> None:
        """Uses that were taken and could not be recorded."""
        with self._lock:
            self._touched.update(keys)

    def save(self, agent: UnsavedAgent) -> None:
        """The newest update of an agent."""
        with self._lock:
            self._unsaved[agent.update.id] = agent

    def saved(self, agents: Iterable[UnsavedAgent]) -> None:
        """These updates need no saving any more."""
        with self._lock:
            for agent in agents:
                if self._unsaved.get(agent.update.id) is agent:
                    del self._unsaved[agent.update.id]

    def unsaved_tips(self) -> set[BlockKey]:
        """Last blocks of agents that are not committed."""
        with self._lock:
            return {tip_of(agent.update) for agent in self._unsaved.values()}

    def unsaved_keys(self, but: UnsavedAgent | None = None) -> set[BlockKey]:
        """Blocks on the chains of updates that are not committed, `but` excepted."""
        with self._lock:
            unsaved = [agent for agent in self._unsaved.values() if agent is not but]
            return {link.key for agent in unsaved for link in agent.update.links}

    def apply(self, change: Change) -> None:
        """`change` is committed."""
        with self._lock:
            self._index.apply(change)
            # One of history alone says nothing of a payload that is still to be written.
            self._drop({row.key for row in change.rows.values() if row.nbytes} | change.removed.keys())
            self._damaged -= change.rows.keys() | change.removed.keys()

    def agent_ids(self) -> list[AgentId]:
        """All agents, committed or not, in no order."""
        with self._lock:
            return list(self._index.agents.keys() | self._unsaved.keys())

    def named(self, tenant: str, name: str, namespace: Namespace | None = None) -> list[AgentId]:
        """The agents of that name, one per namespace; without one, all."""
        ids = [one for one in self.agent_ids() if (one.tenant, one.name) == (tenant, name)]
        return [one for one in ids if namespace in (None, one.namespace)]

    def stored_keys(self) -> list[BlockKey]:
        """Blocks whose KV is on disk."""
        with self._lock:
            return [key for key, row in self._index.blocks.items() if row.nbytes]

    def knows(self, key: BlockKey) -> bool:
        """Whether the block's tokens are recorded."""
        return key in self._index.blocks

    def sizes(self) -> tuple[int, int, int]:
        """How many blocks are stored, how many are history only, how many agents there are."""
        num_stored = len(self.stored_keys())
        with self._lock:
            num_agents = len(self._index.agents.keys() | self._unsaved.keys())
            return num_stored, len(self._index.blocks) - num_stored, num_agents

    def agent(self, id: AgentId) -> Agent | None:
        """The agent as it is now; `durable_tokens` counts what a crash would leave."""
        with self._lock:
            row, unsaved = self._index.agents.get(id), self._unsaved.get(id)
            if row is None and unsaved is None:
                return None
            committed = self._index.chain(row.tip) if row is not None else []
            stored = self._stored_head(committed)
            num_checkpoints = len(self._index.checkpoints.get(id, ()))
        if unsaved is None:
            assert row is not None
            return _agent(row, stored, num_checkpoints)
        current = {link.key for link in unsaved.update.links}
        kept = [block for block in stored if block.key in current]
        return _agent(agent_row(unsaved, row), kept, num_checkpoints)

    def checkpoints(self, id: AgentId) -> list[Checkpoint]:
        """The agent's checkpoints, the oldest first."""
        with self._lock:
            rows = list(self._index.checkpoints.get(id, {}).values())
        found = [Checkpoint(row.id.tag, row.tip, row.num_tokens, row.created_at) for row in rows]
        return sorted(found, key=lambda checkpoint: (checkpoint.created_at, checkpoint.tag))

    def snapshot(self, row: AgentRow) -> Snapshot:
        """A recorded agent, its checkpoints and all their blocks. A damaged payload counts as none."""
        with self._lock:
            checkpoints = tuple(self._index.checkpoints.get(row.id, {}).values())
            blocks = {key: self._index.blocks[key] for key in self._index.reachable((row, *checkpoints))}
            whole = {
                key: block if self._has_payload(key) else block.without_payload()
                for key, block in blocks.items()
            }
        return Snapshot(row, checkpoints, whole)

    def own_chain(self, id: AgentId) -> list[BlockKey]:
        """Those keys of `chain` that no other agent reaches. Raises AgentNotFound."""
        chain = self.chain(id)
        with self._lock:
            others = self._index.reachable(self._index.refs(but=id))
            for agent in self._unsaved.values():
                if agent.update.id != id:
                    others.update(link.key for link in agent.update.links)
        return [key for key in chain if key not in others]

    def history(self, id: AgentId) -> list[int]:
        """The agent's tokens. Raises AgentNotFound, and StoreError when a part of them is lost."""
        with self._lock:
            row, unsaved = self._index.agents.get(id), self._unsaved.get(id)
            chain = self._index.chain(row.tip) if row is not None else []
        if unsaved is not None:
            links = (token for link in unsaved.update.links for token in link.tokens)
            return [*links, *unsaved.update.rest]
        if row is None:
            raise not_found(id.name)
        tokens = unpack_tokens(b"".join(block.tokens for block in chain) + row.rest)
        if len(tokens) != row.num_tokens or (chain and chain[0].parent != ROOT):
            raise StoreError(
                f"agent {id.name!r}: {row.num_tokens - len(tokens)} of {row.num_tokens} tokens are lost; "
                "delete the agent, or start it anew from its text"
            )
        return tokens

    def chain(self, id: AgentId) -> list[BlockKey]:
        """Keys of the agent's blocks, first to last. Raises AgentNotFound."""
        with self._lock:
            row, unsaved = self._index.agents.get(id), self._unsaved.get(id)
            if unsaved is not None:
                return [link.key for link in unsaved.update.links]
            if row is None:
                raise not_found(id.name)
            return [block.key for block in self._index.chain(row.tip)]

    def check(self) -> None:
        """Raise AssertionError when the view contradicts itself."""
        with self._lock:
            self._index.check()
            assert self._pending_nbytes == sum(len(b.payload) for b in self._pending.values())
            assert self._pending_nbytes <= self._max_pending_nbytes
            num_heads = sum(map(len, self._pending_heads.values()))
            assert num_heads == len(self._pending), "pending heads disagree"

    def _has_payload(self, key: BlockKey) -> bool:
        row = self._index.blocks.get(key)
        return row is not None and row.nbytes > 0 and key not in self._damaged

    def _stored_head(self, chain: list[BlockRow]) -> list[BlockRow]:
        """The blocks of `chain` up to the first hole."""
        if chain and chain[0].parent != ROOT:
            return []
        for number, row in enumerate(chain):
            if not self._has_payload(row.key):
                return chain[:number]
        return chain

    def _drop(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            block = self._pending.pop(key, None)
            if block is not None:
                self._pending_nbytes -= len(block.payload)
                siblings = self._pending_heads[_head(block)]
                siblings.remove(block)
                if not siblings:
                    del self._pending_heads[_head(block)]


def tip_of(update: AgentUpdate) -> BlockKey:
    """The last block of the agent's chain, ROOT when it has none."""
    return update.links[-1].key if update.links else ROOT


def agent_row(agent: UnsavedAgent, before: AgentRow | None) -> AgentRow:
    """The row that an update makes of `before`."""
    update = agent.update
    row = AgentRow(
        update.id,
        update.model,
        tip_of(update),
        agent.rest,
        update.num_tokens,
        created_at=agent.saved_at,
        used_at=agent.saved_at,
        pinned=False,
    )
    if before is None:
        return row
    return replace(
        row,
        created_at=before.created_at,
        pinned=before.pinned,
        parent=before.parent,
        parent_tokens=before.parent_tokens,
        quota_nbytes=before.quota_nbytes,
    )


def not_found(name: str) -> AgentNotFound:
    """The error for an agent that is not there."""
    return AgentNotFound(
        f"no agent is named {name!r}; `dormouse agents ls` lists those there are", param="agent"
    )


def _agent(row: AgentRow, stored: list[BlockRow], num_checkpoints: int) -> Agent:
    return Agent(
        row.id,
        row.model,
        row.tip,
        row.num_tokens,
        sum(block.num_tokens for block in stored),
        sum(block.nbytes for block in stored),
        row.pinned,
        row.created_at,
        row.used_at,
        row.parent,
        row.parent_tokens,
        row.quota_nbytes,
        num_checkpoints,
    )


def _head(block: PendingBlock) -> Head:
    return head_of(block.namespace, block.link.parent, block.tokens)
