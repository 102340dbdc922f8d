"""What the index becomes when a batch is durable. It is only planned here; the keeper commits it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from dormouse.domain.blocks import BlockKey, pack_tokens
from dormouse.store.block_files import WrittenBlock
from dormouse.store.garbage import release_tails
from dormouse.store.index import Index
from dormouse.store.rows import BlockRow, Change
from dormouse.store.view import UnsavedAgent, agent_row


def plan_batch(
    index: Index,
    unsaved_tips: Set[BlockKey],
    written: Sequence[WrittenBlock],
    agents: Iterable[UnsavedAgent],
    used: Mapping[BlockKey, float],
) -> Change:
    """Rows of the blocks whose files were written, of the agents with their histories, and of uses.

    Tails that this makes superfluous go, but for those in `unsaved_tips`.
    """
    change = Change(used=dict(used))
    for block in written:
        _add_block(index, change, block)
    for agent in agents:
        _add_history(index, change, agent)
        change.agents[agent.update.id] = agent_row(agent, index.agents.get(agent.update.id))
    release_tails(index, change, unsaved_tips)
    return change


def _add_block(index: Index, change: Change, written: WrittenBlock) -> None:
    link = written.block.link
    parent = change.rows.get(link.parent) or index.blocks.get(link.parent)
    change.rows[link.key] = BlockRow(
        key=link.key,
        namespace=written.block.namespace,
        parent=link.parent,
        tokens=written.block.tokens,
        num_before=parent.end if parent is not None else 0,
        nbytes=written.nbytes,
        checksum=written.checksum,
        used_at=written.block.used_at,
    )


def _add_history(index: Index, change: Change, agent: UnsavedAgent) -> None:
    """Blocks of which nothing is known yet: their tokens are, without KV."""
    end = 0
    for link in agent.update.links:
        if link.key not in change.rows and link.key not in index.blocks:
            tokens = pack_tokens(link.tokens)
            change.rows[link.key] = BlockRow(
                link.key, agent.update.id.namespace, link.parent, tokens, end, 0, "", agent.saved_at
            )
        end += len(link.tokens)
