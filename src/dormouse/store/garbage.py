"""What may go, and in which order: evictions, finished tails, deleted agents, what nothing reaches.

Every function only plans, from the index; the keeper carries it out.
"""

from __future__ import annotations

from collections.abc import Set

from dormouse.domain.agents import AgentId
from dormouse.domain.blocks import BlockKey
from dormouse.store.index import Head, Index, RefId, head_of
from dormouse.store.rows import AgentRow, BlockRow, Change


def victims(index: Index, nbytes: int) -> list[BlockRow]:
    """Blocks whose files make up at least `nbytes`, or all there are, in the order in which they go.

    Blocks of pinned agents go last, before that the least recently used, the end of a chain before its
    start.
    """
    pinned = index.reachable(
        ref for agent in index.agents.values() if agent.pinned for ref in index.refs_of(agent.id)
    )
    stored = [row for row in index.blocks.values() if row.nbytes]
    _sort_by_use(stored)
    stored.sort(key=lambda row: row.key in pinned)
    return _first(stored, nbytes)


def over_quota(index: Index, agent: AgentRow) -> list[BlockRow]:
    """Blocks that go because the agent is above its quota, in the order in which they go.

    Only blocks count, and go, that no other agent reaches. The least recently used go first, the end of a
    chain before its start: a start without its end still saves time, an end without its start does not.
    """
    if not agent.quota_nbytes:
        return []
    mine = index.reachable(index.refs_of(agent.id)) - index.reachable(index.refs(but=agent.id))
    own = [row for key in mine if (row := index.blocks[key]).nbytes]
    _sort_by_use(own)
    return _first(own, sum(row.nbytes for row in own) - agent.quota_nbytes)


def _sort_by_use(rows: list[BlockRow]) -> None:
    # Stable sorts compare plain numbers, which is several times faster than one of tuples.
    rows.sort(key=lambda row: -row.num_before)
    rows.sort(key=lambda row: row.used_at)


def _first(rows: list[BlockRow], nbytes: int) -> list[BlockRow]:
    """The first of `rows` that make up at least `nbytes`, or all of them."""
    chosen = []
    freed = 0
    for row in rows:
        if freed >= nbytes:
            break
        freed += row.nbytes
        chosen.append(row)
    return chosen


def drop_payload(change: Change, row: BlockRow, reachable: Set[BlockKey]) -> None:
    """Drop the file of `row`; its history stays when an agent needs it."""
    if row.key in reachable:
        change.evict(row)
    else:
        change.remove(row)


def release_tails(index: Index, change: Change, unsaved_tips: Set[BlockKey]) -> None:
    """Add to `change` the unfinished blocks that it makes superfluous.

    A tail goes when a stored block with the same parent starts with its tokens and no agent ends in
    it. That is looked for where it can become true: at every block that `change` stores, and at every tip
    that an agent or a checkpoint leaves.
    """
    after = _After(index, change, unsaved_tips)
    released = []
    for row in [row for row in change.rows.values() if row.nbytes]:
        released += [tail for tail in after.siblings(row) if _continues(row, tail) and after.is_free(tail)]
    left = [index.agents[moving].tip for moving in after.moving_agents]
    left += [index.checkpoints[c.agent][c.tag].tip for c in after.moving_checkpoints]
    for tip in set(left):
        tail = change.rows.get(tip) or index.blocks.get(tip)
        if tail is None or tail.key in change.removed or not after.is_free(tail):
            continue
        if not tail.nbytes or any(_continues(row, tail) for row in after.siblings(tail)):
            released.append(tail)
    for tail in released:
        change.rows.pop(tail.key, None)
        change.remove(tail)


def agent_deletion(index: Index, id: AgentId, unsaved: Set[BlockKey]) -> Change:
    """Delete the agent, its checkpoints and every block that no other agent reaches, descendants included.

    Blocks in `unsaved` are about to be reached by an agent and stay.
    """
    others = index.reachable(index.refs(but=id))
    tags = index.checkpoints.get(id, {})
    change = Change(removed_agents={id}, removed_checkpoints={tag.id for tag in tags.values()}, wipe=True)
    waiting = list(index.reachable(index.refs_of(id)))
    while waiting:
        key = waiting.pop()
        if key not in others and key not in unsaved and key not in change.removed:
            change.remove(index.blocks[key])
            waiting.extend(index.children(key))
    return change


def unreached(index: Index, used_before: float, unsaved: Set[BlockKey]) -> list[BlockRow]:
    """Blocks that no agent reaches and that were last used before that time (Unix seconds)."""
    reachable = index.reachable(index.refs()) | unsaved
    return [r for r in index.blocks.values() if r.used_at < used_before and r.key not in reachable]


class _After:
    """The index as a change will leave it, as far as tails need to know."""

    def __init__(self, index: Index, change: Change, unsaved_tips: Set[BlockKey]) -> None:
        self._index = index
        self._change = change
        self._tips = {agent.tip for agent in change.agents.values()} | unsaved_tips
        self._tips |= {checkpoint.tip for checkpoint in change.checkpoints.values()}
        self.moving_agents = (change.agents.keys() | change.removed_agents) & index.agents.keys()
        leaving = change.removed_checkpoints | change.checkpoints.keys()
        self.moving_checkpoints = {c for c in leaving if c.tag in index.checkpoints.get(c.agent, {})}
        self._moving: set[RefId] = {*self.moving_agents, *self.moving_checkpoints}
        self._parents = {row.parent for row in change.rows.values()}
        self._new: dict[Head, list[BlockRow]] = {}
        for row in change.rows.values():
            if row.nbytes:
                self._new.setdefault(head_of(row.namespace, row.parent, row.tokens), []).append(row)

    def siblings(self, row: BlockRow) -> list[BlockRow]:
        """Blocks with payload that share parent and first token with `row`."""
        head = head_of(row.namespace, row.parent, row.tokens)
        removed, new = self._change.removed, self._change.rows
        kept = (r for r in self._index.at_head(head) if r.key not in removed and r.key not in new)
        return [*kept, *self._new.get(head, ())]

    def is_free(self, tail: BlockRow) -> bool:
        """Whether no agent ends in `tail` and no block follows it."""
        owned = tail.key in self._tips or self._index.owners(tail.key) - self._moving
        return not owned and not self._index.children(tail.key) and tail.key not in self._parents


def _continues(row: BlockRow, tail: BlockRow) -> bool:
    return len(row.tokens) > len(tail.tokens) and row.tokens.startswith(tail.tokens)
