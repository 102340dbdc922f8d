"""Forks, checkpoints, quotas and deletion: refs on shared blocks."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.store.kit import (
    BLOCK_SIZE,
    CACHE,
    NAMESPACE,
    QUOTA,
    Clock,
    FailingOps,
    OpenStore,
    RecordingOps,
    agent_id,
    assert_loads,
    block_files,
    block_path,
    links_of,
    reply,
)

from dormouse.domain.agents import AgentId
from dormouse.domain.blocks import namespace_of
from dormouse.domain.errors import (
    AgentExists,
    AgentNotFound,
    CheckpointNotFound,
    DocumentsFull,
    InvalidRequest,
    StoreError,
)
from dormouse.store.block_store import BlockStore
from dormouse.store.options import StoreOptions

TALK = list(range(100, 100 + 2 * BLOCK_SIZE + 5))


def more(count: int, start: int = 5000) -> list[int]:
    return [*TALK, *range(start, start + count)]


def state(store: BlockStore, folder: Path) -> object:
    """Everything that a failed action must leave alone."""
    store.flush()
    agents = {
        a.id: (store.history(a.id), a.pinned, a.quota_nbytes, a.num_checkpoints) for a in store.agents()
    }
    documents = [store.notebook.page("acme", kind) for kind in ("agent", "transcript", "checkpoint")]
    return agents, documents, block_files(folder)


def test_an_agent_before_its_first_reply(open_store: OpenStore) -> None:
    store = open_store()
    made = store.admin.create(
        agent_id("ada"), "toy", documents={"agent": b"{}"}, pinned=True, quota_nbytes=1 << 20
    )
    assert (made.num_tokens, made.durable_tokens, made.pinned, made.quota_nbytes) == (0, 0, True, 1 << 20)
    assert store.history(made.id) == []
    with pytest.raises(AgentExists, match="ada"):
        store.admin.create(agent_id("ada"), "toy")
    with pytest.raises(AgentExists):
        store.admin.create(agent_id("ada", namespace_of("another model")), "toy")
    store.close()
    store = open_store()
    assert store.agent("acme", "ada") == made
    assert store.notebook.get("acme", "agent", "ada") == b"{}"
    reply(store, "ada", TALK)
    after = store.agent("acme", "ada")
    assert (after.pinned, after.quota_nbytes, after.created_at) == (True, 1 << 20, made.created_at)


def test_a_fork_copies_nothing_and_goes_its_own_way(open_store: OpenStore, folder: Path) -> None:
    store = open_store()
    links = reply(store, "ada", TALK, rest=[7])
    store.notebook.put("acme", "transcript", "ada", b"said")
    before = block_files(folder)
    written = store.stats().counts["bytes_written"]
    fork = store.admin.fork("acme", "ada", "eve")
    assert (fork.parent, fork.parent_tokens, fork.num_tokens) == ("ada", len(TALK) + 1, len(TALK) + 1)
    assert store.history(fork.id) == [*TALK, 7]
    assert store.notebook.get("acme", "transcript", "eve") == b"said"
    assert block_files(folder) == before
    assert store.stats().counts["bytes_written"] == written
    reply(store, "ada", more(40))
    assert store.history(agent_id("eve")) == [*TALK, 7], "its tail is not replaced by another's"
    assert_loads(store, links)
    reply(store, "eve", more(9, start=9000))
    store.delete_agent("acme", "ada")
    store.close()
    store = open_store()
    assert store.history(agent_id("eve")) == more(9, start=9000)
    assert store.agent("acme", "eve").parent == "ada"
    assert_loads(store, links_of(more(9, start=9000)))


def test_names_of_forks(store: BlockStore) -> None:
    reply(store, "ada", TALK)
    reply(store, "eve", TALK)
    with pytest.raises(AgentExists):
        store.admin.fork("acme", "ada", "eve")
    with pytest.raises(AgentNotFound):
        store.admin.fork("acme", "nobody", "new")
    with pytest.raises(AgentNotFound):
        store.admin.fork("other", "ada", "new")
    with pytest.raises(CheckpointNotFound):
        store.admin.fork("acme", "ada", "new", tag="none")
    with pytest.raises(InvalidRequest):
        store.admin.fork("acme", "ada", "\n")


def test_rolling_back_to_a_checkpoint(open_store: OpenStore, clock: Clock) -> None:
    store = open_store()
    links = reply(store, "ada", TALK, rest=[1, 2])
    store.notebook.put("acme", "transcript", "ada", b"then")
    made = store.admin.tag("acme", "ada", "before")
    assert made.num_tokens == len(TALK) + 2
    with pytest.raises(AgentExists):
        store.admin.tag("acme", "ada", "before")
    clock.advance(1)
    reply(store, "ada", more(50))
    store.notebook.put("acme", "transcript", "ada", b"now")
    assert [tag.tag for tag in store.admin.tags("acme", "ada")] == ["before"]
    clock.advance(1)
    store.gc()
    assert_loads(store, links)
    back = store.admin.rollback("acme", "ada", "before")
    assert (back.num_tokens, back.num_checkpoints) == (len(TALK) + 2, 1)
    clock.advance(1)
    assert store.gc().num_blocks > 0, "what it said since belongs to nobody"
    store.close()
    store = open_store()
    assert store.history(agent_id("ada")) == [*TALK, 1, 2]
    assert store.notebook.get("acme", "transcript", "ada") == b"then"
    assert_loads(store, links)
    fork = store.admin.fork("acme", "ada", "eve", tag="before")
    assert store.history(fork.id) == [*TALK, 1, 2]
    store.admin.untag("acme", "ada", "before")
    assert store.admin.tags("acme", "ada") == []
    with pytest.raises(CheckpointNotFound):
        store.admin.rollback("acme", "ada", "before")
    assert store.notebook.page("acme", "checkpoint") == []


def test_a_deleted_checkpoint_frees_its_blocks(store: BlockStore, folder: Path, clock: Clock) -> None:
    reply(store, "ada", TALK)
    store.admin.tag("acme", "ada", "t")
    reply(store, "ada", [1, 2, 3])
    clock.advance(1)
    store.gc()
    kept = {link.key.hex() for link in links_of(TALK)}
    assert kept <= block_files(folder)
    store.admin.untag("acme", "ada", "t")
    store.gc()
    assert block_files(folder) == {link.key.hex() for link in links_of([1, 2, 3])}


@pytest.mark.parametrize("tag", ["", "a/b", "a\nb", "x" * 65, ".."])
def test_tags_that_are_none(store: BlockStore, tag: str) -> None:
    reply(store, "ada", TALK)
    with pytest.raises(InvalidRequest):
        store.admin.tag("acme", "ada", tag)


def test_a_cut_action_leaves_the_store_as_it_was(open_store: OpenStore, folder: Path) -> None:
    ops = FailingOps()
    store = open_store(file_ops=ops)
    reply(store, "ada", TALK)
    store.notebook.put("acme", "transcript", "ada", b"then")
    store.admin.tag("acme", "ada", "t")
    reply(store, "ada", more(30))
    before = state(store, folder)
    ops.errors["commit"] = sqlite3.OperationalError("disk I/O error")
    actions: list[Callable[[], object]] = [
        lambda: store.admin.fork("acme", "ada", "eve"),
        lambda: store.admin.rollback("acme", "ada", "t"),
        lambda: store.admin.tag("acme", "ada", "u"),
        lambda: store.admin.untag("acme", "ada", "t"),
        lambda: store.admin.configure("acme", "ada", pinned=True, quota_nbytes=1),
        lambda: store.admin.create(agent_id("new"), "toy", documents={"agent": b"{}"}),
        lambda: store.delete_agent("acme", "ada"),
    ]
    for action in actions:
        with pytest.raises(StoreError):
            action()
    ops.errors.clear()
    assert state(store, folder) == before
    store.close()
    assert state(open_store(), folder) == before


def test_what_was_answered_survives_a_crash(open_store: OpenStore, folder: Path, tmp_path: Path) -> None:
    """The folder as a SIGKILL leaves it, after each action."""
    store = open_store()
    reply(store, "ada", TALK)

    def after_a_crash(number: int) -> BlockStore:
        copy = shutil.copytree(folder, tmp_path / str(number))
        return BlockStore.open(copy, quota_nbytes=QUOTA)

    store.admin.tag("acme", "ada", "t")
    with after_a_crash(1) as crashed:
        assert [tag.num_tokens for tag in crashed.admin.tags("acme", "ada")] == [len(TALK)]
    store.admin.fork("acme", "ada", "eve")
    with after_a_crash(2) as crashed:
        assert crashed.history(agent_id("eve")) == TALK
        assert crashed.agent("acme", "eve").durable_tokens == len(TALK)
    reply(store, "ada", more(30))
    store.admin.rollback("acme", "ada", "t")
    with after_a_crash(3) as crashed:
        assert crashed.history(agent_id("ada")) == TALK
    store.delete_agent("acme", "ada")
    with after_a_crash(4) as crashed:
        assert [agent.id.name for agent in crashed.agents()] == ["eve"]
        crashed.register(NAMESPACE, CACHE)
        assert_loads(crashed, links_of(TALK))
        assert crashed.verify().is_clean


def test_settings_that_are_too_large_make_no_agent(open_store: OpenStore) -> None:
    store = open_store(options=StoreOptions(max_documents_nbytes=10))
    with pytest.raises(DocumentsFull):
        store.admin.create(agent_id("ada"), "toy", documents={"agent": b"x" * 11})
    assert store.agents() == []


def test_an_agent_above_its_quota_loses_its_own_blocks_never_history(store: BlockStore, clock: Clock) -> None:
    shared = reply(store, "eve", TALK[: 2 * BLOCK_SIZE])
    file_nbytes = store.stats().blocks_nbytes // len(shared)
    reply(store, "ada", more(6 * BLOCK_SIZE))
    store.admin.configure("acme", "ada", quota_nbytes=3 * file_nbytes + 100)
    own = links_of(more(6 * BLOCK_SIZE))[2:]
    stored = [store.has_durable(link.key) for link in own]
    assert stored == [True] * 3 + [False] * (len(own) - 3), "the start of its chain stays"
    assert all(store.has_durable(link.key) for link in shared)
    clock.advance(1)
    longer = more(7 * BLOCK_SIZE)
    reply(store, "ada", longer)
    store.flush()
    assert sum(store.has_durable(link.key) for link in links_of(longer)[2:]) == 3
    assert store.history(agent_id("ada")) == longer


def test_deletion_overwrites_and_takes_everything(open_store: OpenStore, folder: Path) -> None:
    ops = RecordingOps()
    store = open_store(file_ops=ops)
    reply(store, "eve", TALK[:BLOCK_SIZE])
    links = reply(store, "ada", TALK)
    for kind in ("agent", "transcript", "why"):
        store.notebook.put("acme", kind, "ada", b"secret words")
    store.admin.tag("acme", "ada", "t")
    reply(store, "ada", more(30))
    store.notebook.put("acme", "transcript", "eve", b"eve's")
    store.flush()
    ops.steps.clear()
    removed = store.delete_agent("acme", "ada")
    mine = {*(link.key for link in links_of(more(30))), *(link.key for link in links)} - {links[0].key}
    assert removed.keys == mine
    steps = [(step, what) for step, what in ops.steps if step in ("wipe", "unlink")]
    paths = {block_path(folder, key) for key in mine}
    assert {what for step, what in steps if step == "wipe"} == paths
    for path in paths:
        assert steps.index(("wipe", path)) < steps.index(("unlink", path))
    assert block_files(folder) == {links[0].key.hex()}
    assert store.notebook.page("acme", "checkpoint") == []
    assert store.notebook.get("acme", "transcript", "eve") == b"eve's"
    store.close()
    for path in folder.rglob("*"):
        assert path.is_dir() or b"secret words" not in path.read_bytes()


def test_what_a_crash_left_to_be_deleted_is_overwritten(open_store: OpenStore, folder: Path) -> None:
    ops = FailingOps()
    store = open_store(file_ops=ops)
    links = reply(store, "ada", TALK)
    ops.errors |= {"unlink": OSError(5, "I/O error"), "wipe": OSError(5, "I/O error")}
    store.delete_agent("acme", "ada")
    assert block_path(folder, links[0].key).exists()
    store.close()
    again = RecordingOps()
    open_store(file_ops=again)
    assert ("wipe", block_path(folder, links[0].key)) in again.steps
    assert block_files(folder) == set()


def test_a_wiped_file_is_zeros(open_store: OpenStore, folder: Path) -> None:
    store = open_store(file_ops=(ops := RecordingOps()))
    (link,) = reply(store, "ada", TALK[:BLOCK_SIZE])
    path = block_path(folder, link.key)
    size = path.stat().st_size
    ops.wipe(path)
    assert path.read_bytes() == bytes(size)


def test_own_blocks_are_those_that_no_other_agent_has(store: BlockStore) -> None:
    links = reply(store, "ada", TALK)
    reply(store, "eve", TALK[:BLOCK_SIZE])
    assert store.admin.own_chain(agent_id("ada")) == [link.key for link in links[1:]]
    store.admin.fork("acme", "ada", "new")
    assert store.admin.own_chain(agent_id("ada")) == []


def test_a_namespace_says_what_it_is(open_store: OpenStore) -> None:
    store = open_store()
    assert store.identity(NAMESPACE) is None
    store.register(NAMESPACE, CACHE, "weights")
    store.close()
    identity = open_store().identity(NAMESPACE)
    assert identity is not None
    assert (identity.fingerprint, identity.cache) == ("weights", CACHE)
    assert AgentId("acme", "x", identity.namespace("acme")).namespace == namespace_of(
        "weights", CACHE.fingerprint(), "acme"
    )
