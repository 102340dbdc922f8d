"""The pool against its own books, under any order of use."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dormouse.domain.blocks import ROOT, BlockKey, Link, Namespace, block_key
from dormouse.engine.pool import Pool

SPACE = Namespace(b"n" * 16)


def link(parent: BlockKey, *tokens: int) -> Link:
    return Link(block_key(SPACE, parent, tokens), parent, tokens)


def test_pages_come_back_when_freed() -> None:
    pool = Pool(3)
    pages = [pool.allocate() for _ in range(3)]
    assert sorted(pages) == [0, 1, 2]
    with pytest.raises(IndexError):
        pool.allocate()
    pool.free(pages[1])
    assert pool.allocate() == pages[1]


def test_what_is_forgotten_is_found_no_more_and_stays_with_its_user() -> None:
    pool = Pool(3)
    first, second = link(ROOT, 1, 2), link(ROOT, 3)
    after = link(first.key, 5)
    for block in (first, second, after):
        assert pool.register(pool.allocate(), SPACE, block)
    assert set(pool.descendants([first.key])) == {first.key, after.key}
    used, idle = pool.find(first.key), pool.find(after.key)
    assert used is not None
    assert idle is not None
    pool.free(idle)
    for page in (used, idle):
        pool.forget(page)
        pool.check()
    assert (pool.find(first.key), pool.find(after.key), pool.num_used) == (None, None, 2)
    assert pool.find(second.key) is not None
    assert pool.match_head(SPACE, ROOT, (1, 2)) is None
    assert pool.allocate() == idle
    pool.free(used)
    assert pool.allocate() == used, "a page that nobody finds is free, not idle"
    pool.check()


def test_a_registered_page_is_found_until_it_is_evicted() -> None:
    pool = Pool(2)
    page = pool.allocate()
    block = link(ROOT, 1, 2)
    assert pool.register(page, SPACE, block)
    pool.free(page)
    assert pool.find(block.key) == page
    pool.allocate()
    assert pool.find(block.key) == page, "free pages go before idle ones"
    pool.allocate()
    assert pool.find(block.key) is None
    pool.check()


def test_the_tail_of_a_freed_chain_is_evicted_first() -> None:
    pool = Pool(3)
    head, tail = pool.allocate(), pool.allocate()
    first = link(ROOT, 1)
    second = link(first.key, 2)
    pool.register(head, SPACE, first)
    pool.register(tail, SPACE, second)
    for page in (tail, head):
        pool.free(page)
    pool.allocate()
    pool.allocate()
    assert pool.find(second.key) is None
    assert pool.find(first.key) == head


def test_cold_pages_are_evicted_before_warm_ones() -> None:
    pool = Pool(3)
    blocks = [link(ROOT, token) for token in range(3)]
    for block in blocks:
        pool.register(pool.allocate(), SPACE, block)
    for block, warm in zip(blocks, (True, False, False), strict=True):
        page = pool.find(block.key)
        assert page is not None
        pool.free(page, warm=warm)
    pool.allocate()
    pool.allocate()
    assert pool.find(blocks[0].key) is not None
    assert pool.find(blocks[1].key) is pool.find(blocks[2].key) is None
    pool.check()


def test_a_page_that_was_warm_once_stays_so_until_it_holds_something_else() -> None:
    pool = Pool(2)
    warm, cold = link(ROOT, 1), link(ROOT, 2)
    pages = [pool.allocate(), pool.allocate()]
    for page, block in zip(pages, (warm, cold), strict=True):
        pool.register(page, SPACE, block)
    pool.free(pages[0], warm=True)
    pool.share(pages[0])
    for page in pages:
        pool.free(page)
    assert pool.allocate() == pages[1]
    assert pool.allocate() == pages[0]
    pool.register(pages[0], SPACE, warm)
    pool.register(pages[1], SPACE, cold)
    for page in pages:
        pool.free(page)
    assert pool.allocate() == pages[0], "it was forgotten with its content"


def test_sharing_keeps_an_idle_page_from_eviction() -> None:
    pool = Pool(2)
    page = pool.allocate()
    block = link(ROOT, 1)
    pool.register(page, SPACE, block)
    pool.free(page)
    pool.share(page)
    assert pool.allocate() != page
    assert pool.num_available == 0
    assert pool.find(block.key) == page


def test_a_second_page_of_one_name_stays_private() -> None:
    pool = Pool(3)
    first, second = pool.allocate(), pool.allocate()
    block = link(ROOT, 1)
    assert pool.register(first, SPACE, block)
    assert not pool.register(second, SPACE, block)
    pool.free(second)
    assert pool.num_idle == 0
    assert pool.find(block.key) == first
    pool.check()


def test_the_longest_head_matches() -> None:
    pool = Pool(4)
    for tokens in ((1, 2, 9), (1, 2, 3, 9), (5, 2, 3)):
        pool.register(pool.allocate(), SPACE, link(ROOT, *tokens))
    found = pool.match_head(SPACE, ROOT, [1, 2, 3, 4])
    assert found is not None
    assert (found[1].tokens, found[2]) == ((1, 2, 3, 9), 3)
    assert pool.match_head(SPACE, ROOT, [7]) is None
    assert pool.match_head(Namespace(b"m" * 16), ROOT, [1]) is None


def test_freeing_too_often_is_caught() -> None:
    pool = Pool(2)
    page = pool.allocate()
    pool.free(page)
    with pytest.raises(AssertionError, match="freed more often"):
        pool.free(page)


class PoolMachine(RuleBasedStateMachine):
    """The pool beside a plain model: a list of references per page, and names by page."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(5)
        self.held: list[int] = []
        self.names: dict[int, Link] = {}
        self.tips: list[BlockKey] = [ROOT]

    @rule()
    def allocate(self) -> None:
        if self.pool.num_available == 0:
            with pytest.raises(IndexError):
                self.pool.allocate()
            return
        page = self.pool.allocate()
        assert page not in self.held
        self.names.pop(page, None)
        self.held.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), warm=st.booleans())
    def free(self, data: st.DataObject, warm: bool) -> None:
        page = data.draw(st.sampled_from(self.held))
        self.held.remove(page)
        self.pool.free(page, warm=warm)

    @precondition(lambda self: any(p not in self.names for p in self.held))
    @rule(data=st.data(), token=st.integers(0, 2))
    def register(self, data: st.DataObject, token: int) -> None:
        page = data.draw(st.sampled_from([p for p in self.held if p not in self.names]))
        block = link(data.draw(st.sampled_from(self.tips)), token)
        is_new = all(named.key != block.key for named in self.names.values())
        assert self.pool.register(page, SPACE, block) == is_new
        if is_new:
            self.names[page] = block
            self.tips.append(block.key)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.names)))
        self.pool.share(page)
        self.held.append(page)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check()
        assert self.pool.num_used == len(set(self.held))
        for page, name in self.names.items():
            assert self.pool.find(name.key) == page


TestPoolMachine = PoolMachine.TestCase
