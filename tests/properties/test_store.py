"""The store against a model of dicts: whatever is put, saved, deleted, damaged or reopened in any order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.store.kit import (
    CACHE,
    NAMESPACE,
    QUOTA,
    Clock,
    UnsyncedOps,
    agent_id,
    block_files,
    block_path,
    links_of,
    load,
    nbytes_below,
    put_all,
    ram_folder,
    save,
)

from dormouse.domain.blocks import BlockKey, Link
from dormouse.domain.errors import AgentNotFound, DamagedBlock
from dormouse.store.block_store import BlockStore

NAMES = st.sampled_from(["ada", "bob", "cid"])
# Few distinct tokens and lengths around block borders, so that chains share, fork and grow.
TOKENS = st.builds(
    lambda head, length, end: [head] * length + end,
    st.integers(0, 1),
    st.sampled_from([0, 1, 5, 15, 16, 17, 31, 32, 40]),
    st.lists(st.integers(0, 1), max_size=3),
)


class StoreMachine(RuleBasedStateMachine):
    """`saved` is what agents said last; `lost` are blocks whose files the machine damaged."""

    def __init__(self) -> None:
        super().__init__()
        self.resources = ExitStack()
        self.folder = self.resources.enter_context(ram_folder()) / "data"
        self.clock = Clock()
        self.saved: dict[str, tuple[list[int], list[int]]] = {}
        self.known: dict[BlockKey, Link] = {}
        self.open()

    def open(self) -> None:
        self.store = BlockStore.open(
            self.folder, quota_nbytes=QUOTA, file_ops=UnsyncedOps(), clock=self.clock
        )
        self.store.register(NAMESPACE, CACHE)

    def teardown(self) -> None:
        self.store.close()
        self.resources.close()

    def offer(self, tokens: Sequence[int]) -> list[Link]:
        links = links_of(tokens)
        put_all(self.store, links)
        self.known.update((link.key, link) for link in links)
        return links

    @rule(name=NAMES, tokens=TOKENS, rest=st.lists(st.integers(0, 9), max_size=2))
    def reply(self, name: str, tokens: list[int], rest: list[int]) -> None:
        self.clock.advance(1)
        links = self.offer(tokens)
        assert save(self.store, name, links, rest)
        self.saved[name] = tokens, rest
        assert all(self.store.has_durable(link.key) for link in links)
        assert self.store.agent("acme", name).durable_tokens == len(tokens)

    @rule(name=NAMES, tokens=TOKENS)
    def save_history_alone(self, name: str, tokens: list[int]) -> None:
        self.clock.advance(1)
        assert save(self.store, name, links_of(tokens))
        self.saved[name] = tokens, []

    @rule(tokens=TOKENS)
    def anonymous(self, tokens: list[int]) -> None:
        self.clock.advance(1)
        self.offer(tokens)

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        if name not in self.saved:
            try:
                self.store.delete_agent("acme", name)
            except AgentNotFound:
                return
            raise AssertionError("deleted an agent that is not there")
        gone = self.store.chain(agent_id(name))
        self.store.delete_agent("acme", name)
        del self.saved[name]
        kept = {link.key for tokens, _ in self.saved.values() for link in links_of(tokens)}
        assert not any(self.store.contains(key) for key in gone if key not in kept)

    @rule(seconds=st.integers(0, 3))
    def gc(self, seconds: int) -> None:
        self.store.gc(unused_for_s=seconds)

    @rule(name=NAMES, pinned=st.booleans())
    @precondition(lambda self: self.saved)
    def pin(self, name: str, pinned: bool) -> None:
        if name in self.saved:
            self.store.set_pinned("acme", name, pinned)
            assert self.store.agent("acme", name).pinned == pinned

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.open()
        assert self.store.verify().is_clean

    @rule(data=st.data(), position=st.integers(0, 7000))
    @precondition(lambda self: self.known)
    def damage(self, data: st.DataObject, position: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.known)))
        self.store.flush()
        if not self.store.has_durable(key):
            return
        path = block_path(self.folder, key)
        content = bytearray(path.read_bytes())
        content[position % len(content)] ^= 64
        path.write_bytes(content)
        assert isinstance(load(self.store, key)[0], DamagedBlock)
        assert not self.store.contains(key)

    @invariant()
    def histories_are_whole(self) -> None:
        assert {agent.id.name for agent in self.store.agents()} == set(self.saved)
        for name, (tokens, rest) in self.saved.items():
            assert self.store.history(agent_id(name)) == tokens + rest

    @invariant()
    def memory_and_disk_agree(self) -> None:
        assert self.store.flush()
        self.store.check()
        on_disk = block_files(self.folder)
        for key, link in self.known.items():
            assert self.store.contains(key) == (key.hex() in on_disk)
            found = self.store.children(NAMESPACE, link.parent, link.tokens[0])
            assert (link in found) == self.store.contains(key)
        assert on_disk <= {key.hex() for key in self.known}
        assert self.store.stats().nbytes == nbytes_below(self.folder)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
