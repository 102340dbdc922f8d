"""The catalog in memory: all rows, and the ways to find them. Changed by `apply` alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from dormouse.domain.agents import AgentId
from dormouse.domain.blocks import ROOT, BlockKey, Namespace, packed_block_key
from dormouse.store.files import TOKEN_NBYTES
from dormouse.store.rows import AgentRow, BlockRow, Change, CheckpointId, CheckpointRow

K = TypeVar("K")
V = TypeVar("V")

RefId = AgentId | CheckpointId

Head = tuple[Namespace, BlockKey, bytes]
"""Where a block continues a chain: namespace, parent and first token (packed)."""


def head_of(namespace: Namespace, parent: BlockKey, tokens: bytes) -> Head:
    """The head of a block with these packed tokens."""
    return namespace, parent, tokens[:TOKEN_NBYTES]


class Index:
    """A mirror of the committed catalog. Only the writer thread changes it, so the writer reads it freely."""

    def __init__(self) -> None:
        self.blocks: dict[BlockKey, BlockRow] = {}
        self.agents: dict[AgentId, AgentRow] = {}
        self._heads: dict[Head, set[BlockKey]] = {}
        self._children: dict[BlockKey, set[BlockKey]] = {}
        self.checkpoints: dict[AgentId, dict[str, CheckpointRow]] = {}
        self._owners: dict[BlockKey, set[RefId]] = {}

    def apply(self, change: Change) -> None:
        """Do to the index what was committed to the catalog."""
        for row in change.removed.values():
            self._remove(row.key)
        for row in change.rows.values():
            self._remove(row.key)
            self._insert(row)
        for moving in change.removed_agents | change.agents.keys():
            self._remove_agent(moving)
        for agent in change.agents.values():
            self.agents[agent.id] = agent
            self._owners.setdefault(agent.tip, set()).add(agent.id)
        for leaving in change.removed_checkpoints | change.checkpoints.keys():
            self._remove_checkpoint(leaving)
        for checkpoint in change.checkpoints.values():
            self.checkpoints.setdefault(checkpoint.id.agent, {})[checkpoint.id.tag] = checkpoint
            self._owners.setdefault(checkpoint.tip, set()).add(checkpoint.id)

    def at_head(self, head: Head) -> Iterator[BlockRow]:
        """Blocks with payload that continue a chain in this way."""
        return (self.blocks[key] for key in self._heads.get(head, ()))

    def children(self, key: BlockKey) -> Iterable[BlockKey]:
        """Blocks whose parent this is, with or without payload. Not kept for ROOT."""
        return self._children.get(key, ())

    def refs(self, *, but: AgentId | None = None) -> Iterator[AgentRow | CheckpointRow]:
        """Everything that keeps blocks: agents and their checkpoints, those of `but` left out."""
        yield from (agent for agent in self.agents.values() if agent.id != but)
        for owner, tags in self.checkpoints.items():
            if owner != but:
                yield from tags.values()

    def refs_of(self, id: AgentId) -> list[AgentRow | CheckpointRow]:
        """One agent and its checkpoints."""
        agent = self.agents.get(id)
        return [*([agent] if agent is not None else []), *self.checkpoints.get(id, {}).values()]

    def owners(self, tip: BlockKey) -> set[RefId]:
        """Agents and checkpoints whose chain ends in `tip`."""
        return self._owners.get(tip, set())

    def chain(self, tip: BlockKey) -> list[BlockRow]:
        """Rows from the first block to `tip`; shorter at the front when a row is missing."""
        rows = []
        row = self.blocks.get(tip)
        while row is not None:
            rows.append(row)
            row = self.blocks.get(row.parent)
        rows.reverse()
        return rows

    def reachable(self, refs: Iterable[AgentRow | CheckpointRow]) -> set[BlockKey]:
        """Keys of every block on the chains of `refs`."""
        seen: set[BlockKey] = set()
        for ref in refs:
            key = ref.tip
            while key not in seen and key in self.blocks:
                seen.add(key)
                key = self.blocks[key].parent
        return seen

    def check(self) -> None:
        """Raise AssertionError when the index contradicts itself."""
        for key, row in self.blocks.items():
            assert row.key == key, "row filed under another key"
            assert packed_block_key(row.namespace, row.parent, row.tokens) == key, "key does not follow"
            heads = self._heads.get(head_of(row.namespace, row.parent, row.tokens), set())
            assert (key in heads) == (row.nbytes > 0), "head set disagrees about payload"
            assert row.parent == ROOT or key in self._children[row.parent], "child is not listed"
        assert sum(map(len, self._heads.values())) == sum(row.nbytes > 0 for row in self.blocks.values())
        assert sum(map(len, self._children.values())) == sum(r.parent != ROOT for r in self.blocks.values())
        num_refs = len(self.agents) + sum(map(len, self.checkpoints.values()))
        assert sum(map(len, self._owners.values())) == num_refs, "tips disagree with agents"
        for owner, tags in self.checkpoints.items():
            assert owner in self.agents, "checkpoints of no agent"
            assert all(c.id in self._owners[c.tip] for c in tags.values()), "checkpoint not at its tip"
        for agent in self.agents.values():
            assert agent.id in self._owners[agent.tip], "agent does not own its tip"
            chain = self.chain(agent.tip)
            num_tokens = sum(row.num_tokens for row in chain) + len(agent.rest) // TOKEN_NBYTES
            # Less is damage that was found at start, which `history` reports; more is an error of ours.
            assert num_tokens <= agent.num_tokens, f"history of {agent.id.name!r} is too long"

    def _insert(self, row: BlockRow) -> None:
        self.blocks[row.key] = row
        if row.nbytes:
            head = head_of(row.namespace, row.parent, row.tokens)
            self._heads.setdefault(head, set()).add(row.key)
        if row.parent != ROOT:
            self._children.setdefault(row.parent, set()).add(row.key)

    def _remove(self, key: BlockKey) -> None:
        row = self.blocks.pop(key, None)
        if row is not None:
            _discard(self._heads, head_of(row.namespace, row.parent, row.tokens), key)
            _discard(self._children, row.parent, key)

    def _remove_agent(self, id: AgentId) -> None:
        agent = self.agents.pop(id, None)
        if agent is not None:
            _discard(self._owners, agent.tip, id)

    def _remove_checkpoint(self, id: CheckpointId) -> None:
        checkpoint = self.checkpoints.get(id.agent, {}).pop(id.tag, None)
        if checkpoint is not None:
            _discard(self._owners, checkpoint.tip, id)
            if not self.checkpoints[id.agent]:
                del self.checkpoints[id.agent]


def _discard(sets: dict[K, set[V]], name: K, member: V) -> None:
    members = sets.get(name)
    if members is not None:
        members.discard(member)
        if not members:
            del sets[name]
