"""The store as its callers see it: blocks, agents, tails."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from tests.store.kit import (
    BLOCK_SIZE,
    CACHE,
    NAMESPACE,
    WAIT_S,
    Clock,
    FaultyOps,
    GatedOps,
    OpenStore,
    RecordingOps,
    agent_id,
    assert_loads,
    block_files,
    links_of,
    load,
    nbytes_below,
    payload_of,
    put_all,
    reply,
    save,
    update_of,
)

from dormouse.domain.agents import AgentUpdate
from dormouse.domain.blocks import ROOT, Link, namespace_of
from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.domain.errors import AgentNotFound, BlockMissing, InvalidRequest, StoreError, StoreLocked
from dormouse.store.block_store import BlockStore
from dormouse.store.options import StoreOptions


def test_a_block_comes_back_as_it_was_put(store: BlockStore) -> None:
    links = links_of(range(40))
    put_all(store, links)
    assert store.flush()
    assert all(store.contains(link.key) and store.has_durable(link.key) for link in links)
    assert_loads(store, links)


def test_blocks_and_agents_survive_a_restart(open_store: OpenStore) -> None:
    first = open_store()
    links = reply(first, "ada", range(40), rest=[7, 8])
    first.close()
    second = open_store()
    assert_loads(second, links)
    agent = second.agent("acme", "ada")
    assert (agent.num_tokens, agent.durable_tokens, agent.tip) == (42, 40, links[-1].key)
    assert second.history(agent.id) == [*range(40), 7, 8]
    assert second.verify().is_clean


def test_nothing_is_written_twice(store: BlockStore) -> None:
    reply(store, "ada", range(40))
    written = store.stats().counts["bytes_written"]
    reply(store, "ada", range(40))
    assert store.stats().counts["bytes_written"] == written


def test_a_pending_block_is_served_from_memory(open_store: OpenStore) -> None:
    ops = GatedOps("open_temp")
    store = open_store(file_ops=ops)
    (link,) = links_of(range(BLOCK_SIZE))
    ops.gate.clear()
    put_all(store, [link])
    assert store.contains(link.key)
    assert not store.has_durable(link.key)
    assert [child.key for child in store.children(NAMESPACE, ROOT, 0)] == [link.key]
    assert_loads(store, [link])
    ops.gate.set()
    assert store.flush()
    assert store.has_durable(link.key)


def test_a_full_queue_refuses_and_counts(open_store: OpenStore) -> None:
    ops = GatedOps("open_temp")
    store = open_store(file_ops=ops, options=StoreOptions(queue_nbytes=2 * CACHE.block_nbytes))
    links = links_of(range(3 * BLOCK_SIZE))
    ops.gate.clear()
    put_all(store, links[:2])
    assert not store.put(NAMESPACE, links[2], payload_of(links[2].key))
    assert not store.contains(links[2].key)
    assert store.put(NAMESPACE, links[1], payload_of(links[1].key)), "a pending block is no new one"
    assert store.stats().counts["refused_puts"] == 1
    ops.gate.set()
    assert store.flush()
    put_all(store, links)


def test_children_are_found_by_first_token(store: BlockStore) -> None:
    (system,) = links_of(range(BLOCK_SIZE))
    left, right = links_of([*range(16), *[1] * 16])[1], links_of([*range(16), *[2] * 16])[1]
    put_all(store, [system, left, right])
    assert store.flush()
    assert store.children(NAMESPACE, system.key, 1) == [left]
    assert store.children(NAMESPACE, system.key, 2) == [right]
    assert store.children(NAMESPACE, system.key, 3) == []
    assert store.children(namespace_of("other"), ROOT, 0) == []


def test_an_unknown_block_is_a_plain_miss(store: BlockStore) -> None:
    error, _ = load(store, links_of([1])[0].key)
    assert isinstance(error, BlockMissing)
    assert store.stats().counts["damaged"] == 0


def test_wrong_use_is_refused_where_it_happens(store: BlockStore) -> None:
    (link,) = links_of(range(16))
    with pytest.raises(ValueError, match="not registered"):
        store.put(namespace_of("unknown"), link, b"")
    with pytest.raises(ValueError, match="payload of 3 bytes"):
        store.put(NAMESPACE, link, b"abc")
    with pytest.raises(ValueError, match="block of 0 tokens"):
        store.put(NAMESPACE, Link(link.key, ROOT, ()), payload_of(link.key))
    with pytest.raises(ValueError, match="does not follow"):
        store.put(NAMESPACE, Link(link.key, ROOT, (1, 2)), payload_of(link.key))
    with pytest.raises(ValueError, match="32 bits"):
        store.put(NAMESPACE, Link(link.key, ROOT, (1 << 40,)), payload_of(link.key))
    with pytest.raises(ValueError, match="another cache"):
        store.register(NAMESPACE, CacheSpec(KVFormat.Q4, 16, 2, 1, 64, 64, 64))
    put_all(store, [link])
    with pytest.raises(ValueError, match="not a page"):
        store.load(link.key, memoryview(bytearray(5)), print)
    with pytest.raises(ValueError, match="not a chain"):
        store.save_agent(update_of("ada", links_of(range(40))[1:]))
    with pytest.raises(ValueError, match="32 bits"):
        store.save_agent(update_of("ada", [], rest=[-1]))
    with pytest.raises(UnicodeEncodeError):
        store.save_agent(AgentUpdate(agent_id("ada"), "\ud800", (), ()))
    assert store.flush(), "the writer saw none of it"
    with pytest.raises(InvalidRequest):
        store.save_agent(AgentUpdate(agent_id("a\nb"), "toy", (), ()))


def test_history_needs_no_payload(store: BlockStore) -> None:
    assert save(store, "ada", links_of(range(40)), rest=[9])
    agent = store.agent("acme", "ada")
    assert (agent.num_tokens, agent.durable_tokens, agent.stored_nbytes) == (41, 0, 0)
    assert store.history(agent.id) == [*range(40), 9]
    assert not store.contains(links_of(range(40))[0].key)
    stats = store.stats()
    assert (stats.num_blocks, stats.num_history_only, stats.num_agents) == (0, 3, 1)


def test_an_agent_of_rest_tokens_alone(open_store: OpenStore) -> None:
    store = open_store()
    assert save(store, "new", [], rest=[1, 2])
    store.close()
    again = open_store()
    assert again.history(agent_id("new")) == [1, 2]
    again.delete_agent("acme", "new")
    assert again.agents() == []


def test_agents_are_listed_by_tenant_last_used_first(store: BlockStore, clock: Clock) -> None:
    for name in ("ada", "bob", "ada"):
        clock.advance(1)
        reply(store, name, range(20))
    assert [agent.id.name for agent in store.agents("acme")] == ["ada", "bob"]
    assert store.agents("else") == []
    with pytest.raises(AgentNotFound):
        store.agent("else", "ada")
    ada = store.agent("acme", "ada")
    assert ada.used_at - ada.created_at == 2


def test_a_name_in_two_namespaces_is_two_agents(store: BlockStore, clock: Clock) -> None:
    other = namespace_of("another model")
    reply(store, "ada", range(20))
    clock.advance(1)
    links = links_of(range(5), other)
    store.save_agent(AgentUpdate(agent_id("ada", other), "big", tuple(links), ()))
    assert store.flush()
    newest, first = store.agent("acme", "ada"), store.agent("acme", "ada", NAMESPACE)
    assert (newest.model, first.model) == ("big", "toy")
    store.delete_agent("acme", "ada")
    assert store.agents() == []


def test_the_newest_update_wins_and_all_are_answered(open_store: OpenStore) -> None:
    ops = GatedOps("commit")
    store = open_store(file_ops=ops)
    reply(store, "ada", range(8))
    ops.gate.clear()
    store.save_agent(update_of("bob", []))
    assert ops.reached.wait(WAIT_S)
    answers: list[bool] = []
    for length in (20, 30, 40):
        store.save_agent(update_of("ada", links_of(range(length))), answers.append)
    assert store.history(agent_id("ada")) == list(range(40)), "what is unsaved is seen"
    ada = store.agent("acme", "ada")
    assert ada.durable_tokens == 0, "the tail that is on disk is not on the new chain"
    ops.gate.set()
    assert store.flush()
    assert answers == [True, True, True]
    assert store.history(agent_id("ada")) == list(range(40))


def test_a_commit_does_not_hide_a_newer_update(open_store: OpenStore) -> None:
    gates = [threading.Event(), threading.Event()]
    done = threading.Event()
    commits: list[int] = []

    def hook(step: str, _: object) -> None:
        if step == "commit" and opened:
            commits.append(len(commits))
            assert gates[len(commits) - 1].wait(WAIT_S)

    opened: list[BlockStore] = []
    opened.append(open_store(file_ops=FaultyOps(hook)))
    store = opened[0]
    store.save_agent(update_of("ada", links_of(range(20))), lambda _: done.set())
    while not commits:
        pass
    store.save_agent(update_of("ada", links_of(range(30))))
    gates[0].set()
    assert done.wait(WAIT_S)
    assert store.history(agent_id("ada")) == list(range(30))
    gates[1].set()
    assert store.flush()
    assert store.history(agent_id("ada")) == list(range(30))


def test_a_grown_tail_replaces_its_past(store: BlockStore, folder: Path) -> None:
    for length in range(1, 36):
        reply(store, "ada", range(length))
        assert block_files(folder) == {link.key.hex() for link in links_of(range(length))}
    assert store.stats().num_history_only == 0


def test_an_anonymous_tail_goes_too(store: BlockStore, folder: Path) -> None:
    put_all(store, links_of(range(20)))
    assert store.flush()
    put_all(store, links_of(range(25)))
    assert store.flush()
    assert block_files(folder) == {link.key.hex() for link in links_of(range(25))}


def test_a_tail_stays_while_another_agent_ends_in_it(store: BlockStore, folder: Path) -> None:
    tail = reply(store, "ada", range(20))[-1]
    reply(store, "fork", range(20))
    reply(store, "ada", range(30))
    assert tail.key.hex() in block_files(folder)
    assert store.history(agent_id("fork")) == list(range(20))
    reply(store, "fork", range(30))
    assert tail.key.hex() not in block_files(folder)


def test_a_tail_of_other_tokens_stays(store: BlockStore) -> None:
    tail = reply(store, "ada", [*range(18), 5])[-1]
    reply(store, "bob", range(30))
    assert store.contains(tail.key)


def test_deleting_an_agent_removes_what_only_it_reached(store: BlockStore, folder: Path) -> None:
    shared = links_of(range(16))
    reply(store, "ada", [*range(16), *[1] * 20])
    reply(store, "bob", [*range(16), *[2] * 20])
    put_all(store, links_of([*range(16), *[1] * 32]))
    removed = store.delete_agent("acme", "ada")
    assert removed.num_blocks == 3, "the anonymous continuation goes with the chain it stands on"
    assert store.contains(shared[0].key)
    assert block_files(folder) == {link.key.hex() for link in links_of([*range(16), *[2] * 20])}
    with pytest.raises(AgentNotFound):
        store.history(agent_id("ada"))
    with pytest.raises(AgentNotFound):
        store.delete_agent("acme", "ada")
    with pytest.raises(AgentNotFound):
        store.set_pinned("acme", "ada", True)
    assert store.history(agent_id("bob")) == [*range(16), *[2] * 20]


def test_deleted_text_is_nowhere_on_disk(open_store: OpenStore, folder: Path) -> None:
    secret = [0x5EC0DE00 + n for n in range(40)]
    needle = secret[3].to_bytes(4, "little")
    store = open_store()
    reply(store, "ada", secret)
    store.delete_agent("acme", "ada")
    store.close()
    assert all(needle not in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_gc_removes_what_nothing_reaches_and_nobody_used(store: BlockStore, clock: Clock) -> None:
    kept = reply(store, "ada", range(20))
    put_all(store, links_of([1] * 32))
    store.flush()
    clock.advance(100)
    store.touch([links_of([1] * 32)[0].key])
    removed = store.gc(unused_for_s=50)
    assert removed.num_blocks == 1
    clock.advance(100)
    assert store.gc(unused_for_s=50).num_blocks == 1
    assert_loads(store, kept)
    assert store.stats().num_blocks == len(kept)


def test_files_are_owner_only(store: BlockStore, folder: Path) -> None:
    reply(store, "ada", range(20))
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_an_open_folder_is_made_private(folder: Path, open_store: OpenStore) -> None:
    folder.mkdir(mode=0o755)
    open_store()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_agent_names_never_become_paths(store: BlockStore, folder: Path) -> None:
    reply(store, "../../etc/passwd", range(20))
    assert all("passwd" not in str(path) for path in folder.rglob("*"))


def test_steps_come_in_the_order_that_survives_a_crash(open_store: OpenStore) -> None:
    ops = RecordingOps()
    store = open_store(file_ops=ops)
    ops.steps.clear()
    reply(store, "ada", range(4))
    steps = [step for step, _ in ops.steps]
    assert steps[:4] == ["make_folder", "fsync_folder", "make_folder", "fsync_folder"]
    assert steps[4:11] == ["open_temp", "write", "fsync", "close", "rename", "fsync_folder", "commit"]
    assert set(steps[11:]) <= {"commit"}, "block and agent may share a transaction"
    ops.steps.clear()
    store.delete_agent("acme", "ada")
    assert [step for step, _ in ops.steps] == ["commit", "wipe", "unlink", "fold"]


def test_a_second_owner_is_told_who_the_first_is(store: BlockStore, folder: Path) -> None:
    with pytest.raises(StoreLocked, match=f"process {os.getpid()}"):
        BlockStore.open(folder, quota_nbytes=1 << 20)
    store.close()
    BlockStore.open(folder, quota_nbytes=1 << 20).close()


def test_after_close(open_store: OpenStore) -> None:
    store = open_store()
    links = links_of(range(20))
    put_all(store, links)
    store.close()
    store.close()
    assert store.has_durable(links[0].key), "close writes what is queued"
    assert not store.put(NAMESPACE, links_of([5])[0], payload_of(links_of([5])[0].key))
    assert not save(store, "ada", links)
    assert not store.flush()
    with pytest.raises(StoreError, match="closed"):
        load(store, links[0].key)


def test_the_ledger_is_what_the_files_are(open_store: OpenStore, folder: Path) -> None:
    store = open_store()
    for length in (10, 40, 100):
        reply(store, "ada", range(length))
        assert store.flush()
        assert store.stats().nbytes == nbytes_below(folder)
    store.delete_agent("acme", "ada")
    assert store.stats().nbytes == nbytes_below(folder)
    store.close()
    assert open_store().stats().nbytes == nbytes_below(folder)


def test_a_callback_that_fails_harms_nobody(store: BlockStore, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("callback")

    links = links_of(range(16))
    put_all(store, links)
    store.save_agent(update_of("ada", links), fail)
    assert store.flush()
    store.load(links[0].key, memoryview(bytearray(CACHE.block_nbytes)), fail)
    assert_loads(store, links)
    store.close()
    assert caplog.text.count("RuntimeError: callback") == 2


def test_uses_are_recorded_at_close(open_store: OpenStore, clock: Clock) -> None:
    old, new = links_of([1] * 16), links_of([2] * 16)
    store = open_store()
    put_all(store, [*old, *new])
    store.flush()
    clock.advance(10)
    store.touch([old[0].key])
    store.close()
    store = open_store()
    clock.advance(10)
    store.gc(unused_for_s=15)
    assert store.contains(old[0].key)
    assert not store.contains(new[0].key)
