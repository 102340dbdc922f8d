"""What goes first, as the planning functions see it."""

from __future__ import annotations

from tests.store.kit import BLOCK_SIZE, NAMESPACE, agent_id, links_of

from dormouse.domain.blocks import pack_tokens
from dormouse.store.garbage import release_tails, victims
from dormouse.store.index import Index
from dormouse.store.rows import AgentRow, BlockRow, Change

FILE_NBYTES = 1000


def rows_of(tokens: list[int], used_at: float, nbytes: int = FILE_NBYTES) -> list[BlockRow]:
    return [
        BlockRow(
            link.key, NAMESPACE, link.parent, pack_tokens(link.tokens), n * BLOCK_SIZE, nbytes, "", used_at
        )
        for n, link in enumerate(links_of(tokens))
    ]


def agent_at(name: str, rows: list[BlockRow], *, pinned: bool = False) -> AgentRow:
    return AgentRow(agent_id(name), "toy", rows[-1].key, b"", rows[-1].end, 1.0, 1.0, pinned)


def index_of(rows: list[BlockRow], *agents: AgentRow) -> Index:
    index = Index()
    index.apply(Change(rows={row.key: row for row in rows}, agents={agent.id: agent for agent in agents}))
    index.check()
    return index


def test_oldest_first_then_the_end_of_a_chain_pinned_last() -> None:
    old, young, pinned = rows_of([1] * 48, 1.0), rows_of([2] * 48, 2.0), rows_of([3] * 48, 0.5)
    index = index_of([*young, *pinned, *old], agent_at("p", pinned, pinned=True), agent_at("y", young))
    expected = [*reversed(old), *reversed(young), *reversed(pinned)]
    assert victims(index, 1 << 30) == expected


def test_no_more_goes_than_is_needed() -> None:
    rows = rows_of([1] * 80, 1.0)
    assert len(victims(index_of(rows), 2 * FILE_NBYTES)) == 2
    assert len(victims(index_of(rows), 2 * FILE_NBYTES + 1)) == 3
    assert victims(index_of(rows_of([1] * 80, 1.0, nbytes=0)), 1) == []


def test_history_is_no_heir_of_a_stored_tail() -> None:
    tail, grown = rows_of([1] * 4, 1.0), rows_of([1] * 16, 1.0, nbytes=0)
    index = index_of(tail, agent_at("a", tail))
    change = Change(rows={grown[0].key: grown[0]}, agents={agent_id("a"): agent_at("a", grown)})
    release_tails(index, change, set())
    assert not change.removed, "it is the only KV of these tokens"


def test_a_tail_of_the_same_batch_goes_with_it() -> None:
    tail, grown = rows_of([1] * 4, 1.0), rows_of([1] * 16, 1.0)
    change = Change(rows={row.key: row for row in (*tail, *grown)})
    release_tails(Index(), change, set())
    assert change.removed.keys() == change.doomed.keys() == {tail[0].key}
    assert change.rows.keys() == {grown[0].key}


def test_a_tail_that_is_about_to_be_saved_stays() -> None:
    tail, grown = rows_of([1] * 4, 1.0), rows_of([1] * 16, 1.0)
    change = Change(rows={row.key: row for row in (*tail, *grown)})
    release_tails(Index(), change, {tail[0].key})
    assert not change.removed
