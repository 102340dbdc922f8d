"""Sleep and waking on the fake runtime, where any wrong page changes the reply."""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.harness import GREEDY, Client, GatedRuntime, opened

from dormouse.domain.agents import AgentId
from dormouse.domain.blocks import BlockKey
from dormouse.domain.errors import AgentNotFound
from dormouse.runtimes.fake import FakeRuntime
from dormouse.store.block_store import BlockStore
from dormouse.store.file_ops import FileOps

TURNS = ("The first turn of a talk that is long enough. ", " And a second turn. ", " Then a third. ")
Between = Callable[[Client], None]


def talk(client: Client, name: str, turns: tuple[str, ...], past: str = "") -> tuple[str, list[int]]:
    """Some turns with an agent: the whole text, and the tokens that each turn did not find cached."""
    computed = []
    for turn in turns:
        past += f"{name}: {turn}"
        reply, finished = client.ask(past, max_tokens=20, agent=name)
        computed.append(finished.usage.prompt_tokens - finished.usage.cached_tokens)
        past += reply
    return past, computed


@pytest.fixture
def expected(tmp_path: Path) -> str:
    with opened(tmp_path / "never-slept", num_pages=64) as client:
        return talk(client, "a", TURNS)[0]


def test_an_evicted_agent_goes_on_where_it_was(tmp_path: Path, expected: str) -> None:
    with opened(tmp_path / "s", num_pages=20) as client:
        past, _ = talk(client, "a", TURNS[:2])
        for name in "bcdef":
            talk(client, name, TURNS[:2])
        past, computed = talk(client, "a", TURNS[2:], past)
        assert client.engine.stats().disk_tokens > 0
    assert past == expected
    assert computed == [len("a: " + TURNS[2]) + 1]


def test_a_restarted_agent_goes_on_where_it_was(tmp_path: Path, expected: str) -> None:
    with opened(tmp_path / "s") as client:
        past, _ = talk(client, "a", TURNS[:2])
    with opened(tmp_path / "s") as client:
        past, computed = talk(client, "a", TURNS[2:], past)
    assert past == expected
    assert computed == [len("a: " + TURNS[2]) + 1], "only what is new, and the last sampled token"


def test_waking_recomputes_one_token(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as client:
        text, _ = client.ask(TURNS[0], agent="a")
    with opened(tmp_path / "s") as client:
        again, finished = client.ask(TURNS[0], agent="a")
    assert again == text
    assert finished.usage.disk_tokens == len(TURNS[0]) - 1


def test_forks_share_blocks_until_they_differ(tmp_path: Path) -> None:
    with opened(tmp_path / "s", num_pages=64) as client:
        past, _ = talk(client, "a", TURNS[:2])
        for name in "bc":
            _, finished = client.ask(past + name, agent=name)
            assert finished.usage.cached_tokens >= len(past) - 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_a_damaged_block_costs_time_and_never_a_word(tmp_path: Path, expected: str, damage: str) -> None:
    folder = tmp_path / "s"
    with opened(folder) as client:
        past, _ = talk(client, "a", TURNS[:2])
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) > 3
    for victim in files[::2]:
        data = bytearray(victim.read_bytes())
        if damage == "flip":
            data[-40] ^= 1
        victim.write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
        if damage == "empty":
            victim.write_bytes(b"")
        if damage == "remove":
            victim.unlink()
    with opened(folder) as client:
        past, _ = talk(client, "a", TURNS[2:], past)
    assert past == expected
    with BlockStore.open(folder, quota_nbytes=1 << 30) as store:
        assert store.verify().is_clean


def test_nothing_is_lost_without_blocks(tmp_path: Path) -> None:
    """Token history is the truth: it is whole although every block file is gone."""
    folder = tmp_path / "s"
    with opened(folder) as client:
        past, _ = talk(client, "a", TURNS)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    with BlockStore.open(folder, quota_nbytes=1 << 30) as store:
        agent = store.agent("default", "a")
        assert agent is not None
        assert agent.durable_tokens == 0
        history = store.history(agent.id)
    assert bytes(history).decode("latin-1") == past


class SlowStore:
    """Holds back loads until the test lets them go, as a hung disk does."""

    def __init__(self, store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_hung = True
        self.held: list[Callable[[], None]] = []
        self.seen = threading.Semaphore(0)
        real = store.load

        def load(key: BlockKey, into: memoryview, done: Callable[[Exception | None], None]) -> None:
            if self.is_hung:
                self.held.append(lambda: real(key, into, done))
                self.seen.release()
            else:
                real(key, into, done)

        monkeypatch.setattr(store, "load", load)

    def release(self) -> None:
        self.is_hung = False
        for load in self.held:
            load()


def test_others_decode_while_an_agent_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path / "s") as client:
        text, _ = client.ask(TURNS[0], agent="a")
    store = BlockStore.open(tmp_path / "s", quota_nbytes=1 << 30)
    slow = SlowStore(store, monkeypatch)
    with opened(tmp_path / "s", store=store) as client:
        sleeper = client.submit(TURNS[0], agent="a")
        assert slow.seen.acquire(timeout=20)
        client.ask("others go on", max_tokens=50)
        assert sleeper.end is None
        slow.release()
        assert sleeper.finished().usage.disk_tokens == len(TURNS[0]) - 1
    assert sleeper.text == text


def test_those_who_wait_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First in the queue first, each once, and no more at a time than a quarter of the arena."""
    prompts = {name: f"{name}: {TURNS[0] * 2}"[:81] for name in "abc"}  # 5 blocks and the last token
    with opened(tmp_path / "s") as client:
        texts = {name: client.ask(prompt, agent=name)[0] for name, prompt in prompts.items()}
    store = BlockStore.open(tmp_path / "s", quota_nbytes=1 << 30)
    chains = {agent.id.name: store.chain(agent.id)[:5] for agent in store.agents()}
    ahead: queue.SimpleQueue[list[BlockKey]] = queue.SimpleQueue()
    monkeypatch.setattr(store, "read_ahead", lambda keys: ahead.put(list(keys)))
    runtime = GatedRuntime(32)
    with opened(tmp_path / "s", store=store, runtime=runtime, max_running=1) as client:
        running = client.submit("somebody else", replace(GREEDY, max_tokens=3))
        assert runtime.started.acquire(timeout=20)
        waiting = {name: client.submit(prompt) for name, prompt in prompts.items()}
        runtime.allow.release()
        assert ahead.get(timeout=20) == chains["a"] + chains["b"][:3], "8 of 32 pages"
        assert runtime.started.acquire(timeout=20)
        runtime.run_freely()
        assert running.finished()
        for name, call in waiting.items():
            call.finished()
            assert call.text == texts[name]
    assert ahead.get_nowait() == chains["c"], "when the first was admitted"
    assert ahead.empty()


def test_a_hung_read_is_given_up_and_its_page_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequence computes instead. The page stays with the read: it may still be written to."""
    with opened(tmp_path / "s") as client:
        text, _ = client.ask(TURNS[0], agent="a")
    store = BlockStore.open(tmp_path / "s", quota_nbytes=1 << 30)
    slow = SlowStore(store, monkeypatch)
    with opened(tmp_path / "s", store=store, load_timeout_s=0.05) as client:
        again, finished = client.ask(TURNS[0], agent="a")
        assert (again, finished.usage.cached_tokens) == (text, 0)
        stats = client.engine.stats()
        assert stats.pages_used == stats.num_overdue == len(slow.held) > 0
        slow.release()
        third, _ = client.ask(TURNS[0] + "x", agent="a")
        assert third
        deadline = time.monotonic() + 20
        while client.engine.stats().num_overdue:
            assert time.monotonic() < deadline, "a read that returned is still overdue"
            threading.Event().wait(0.01)
        assert store.flush()


def test_a_block_that_cannot_be_read_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk may refuse for reasons that say nothing of the block; asking again at once would not end."""
    with opened(tmp_path / "s") as client:
        text, _ = client.ask(TURNS[0], agent="a")
    store = BlockStore.open(tmp_path / "s", quota_nbytes=1 << 30)
    tried: list[BlockKey] = []

    def load(key: BlockKey, into: memoryview, done: Callable[[Exception | None], None]) -> None:
        del into
        tried.append(key)
        done(OSError(errno.EMFILE, "too many open files"))

    monkeypatch.setattr(store, "load", load)
    with opened(tmp_path / "s", store=store) as client:
        again, finished = client.ask(TURNS[0], agent="a")
    assert (again, finished.usage.cached_tokens) == (text, 0)
    assert len(tried) == len(set(tried)) > 0


def test_a_sleeping_request_can_be_aborted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path / "s") as client:
        client.ask(TURNS[0], agent="a")
    store = BlockStore.open(tmp_path / "s", quota_nbytes=1 << 30)
    slow = SlowStore(store, monkeypatch)
    with opened(tmp_path / "s", store=store) as client:
        sleeper = client.submit(TURNS[0], agent="a")
        assert slow.seen.acquire(timeout=20)
        client.engine.abort(sleeper.request.id)
        slow.release()
        _, finished = client.ask(TURNS[0])
        assert finished.usage.cached_tokens > 0


def test_persistence_resumes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the store could not take is offered again at the end of the next reply."""
    store = BlockStore.open(tmp_path / "s", quota_nbytes=1 << 30)
    with opened(tmp_path / "s", store=store) as client:
        with monkeypatch.context() as broken:
            broken.setattr(store, "put", lambda *_: False)
            past, _ = talk(client, "a", TURNS[:1])
            assert store.stats().num_blocks == 0
        past, _ = talk(client, "a", TURNS[1:2], past)
    with opened(tmp_path / "s") as client:
        _, computed = talk(client, "a", TURNS[2:], past)
    assert computed == [len("a: " + TURNS[2]) + 1]


class FullDisk(FileOps):
    """Refuses to write while it is full."""

    def __init__(self) -> None:
        self.is_full = True

    def write(self, fd: int, parts: Sequence[bytes]) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "no space left on device")
        super().write(fd, parts)


def test_a_full_disk_costs_durability_only_and_saving_resumes(tmp_path: Path, expected: str) -> None:
    disk = FullDisk()
    store = BlockStore.open(tmp_path / "s", quota_nbytes=1 << 30, file_ops=disk)
    with opened(tmp_path / "s", store=store) as client:
        past, _ = talk(client, "a", TURNS[:1])
        assert not store.flush()
        assert [reason.code for reason in store.health()] == ["disk_full"]
        assert store.agent("default", "a").durable_tokens == 0
        disk.is_full = False
        past, computed = talk(client, "a", TURNS[1:2], past)
        assert computed == [len("a: " + TURNS[1]) + 1], "memory had it all the while"
        assert store.flush()
        assert store.health() == ()
        agent = store.agent("default", "a")
        assert agent.durable_tokens == agent.num_tokens - 1
        past, _ = talk(client, "a", TURNS[2:], past)
    assert past == expected


def test_sync_answers_when_it_is_on_disk(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    store = BlockStore.open(folder, quota_nbytes=1 << 30)
    with opened(folder, store=store, sync=True) as client:
        client.ask(TURNS[0], agent="a", max_tokens=20)
        agent = store.agent("default", "a")
        assert agent is not None
        assert agent.durable_tokens == agent.num_tokens - 1 == len(TURNS[0]) + 19


def test_sync_gives_up_waiting_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlockStore.open(tmp_path / "s", quota_nbytes=1 << 30)
    monkeypatch.setattr(store, "save_agent", lambda *_: None)
    with opened(tmp_path / "s", store=store, sync=True, sync_timeout_s=0.05) as client:
        client.ask(TURNS[0], agent="a")


def test_a_reply_writes_its_new_blocks_and_one_tail(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    store = BlockStore.open(folder, quota_nbytes=1 << 30)
    with opened(folder, store=store) as client:
        past, _ = talk(client, "a", TURNS[:1])
        store.flush()
        before = store.stats().counts
        past, _ = talk(client, "a", TURNS[1:2], past)
        store.flush()
        after = store.stats().counts
        assert store.stats().num_blocks == -(-(len(past) - 1) // 16), "old tails are gone"
    written = after["blocks_written"] - before["blocks_written"]
    assert written <= len(TURNS[1] + "a: ") // 16 + 20 // 16 + 2


step = st.tuples(st.sampled_from("ab"), st.sampled_from([" x", " some more words", " a long turn " * 3]))


@settings(max_examples=25, deadline=None)
@given(script=st.lists(st.one_of(step, st.just("restart"), st.just("evict")), min_size=2, max_size=8))
def test_sleep_is_invisible_whatever_happens_between(
    tmp_path_factory: pytest.TempPathFactory, script: list[tuple[str, str] | str]
) -> None:
    """Any mix of turns, restarts and evictions answers as one server that never slept."""

    def play(sleeps: bool) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("s")
        pasts = {"a": "a speaks", "b": "b speaks"}
        pending = list(script)
        while pending:
            with opened(folder, num_pages=24 if sleeps else 200, runtime=None) as client:
                while pending:
                    event = pending.pop(0)
                    if isinstance(event, tuple):
                        name, turn = event
                        pasts[name] += turn
                        pasts[name] += client.ask(pasts[name], agent=name, max_tokens=10)[0]
                    elif sleeps and event == "restart":
                        break
                    elif sleeps:
                        client.ask("z" * 250, max_tokens=2)
        return pasts

    assert play(sleeps=True) == play(sleeps=False)


def test_an_agent_id_is_its_tenant_name_and_namespace(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as client:
        client.submit(TURNS[0], replace(GREEDY), agent="a", tenant="t1").finished()
        client.submit(TURNS[0], replace(GREEDY), agent="a", tenant="t2").finished()
    with BlockStore.open(tmp_path / "s", quota_nbytes=1 << 30) as store:
        ids = {agent.id for agent in store.agents()}
        assert {(id_.tenant, id_.name) for id_ in ids} == {("t1", "a"), ("t2", "a")}
        with pytest.raises(AgentNotFound):
            store.history(AgentId("t1", "a", next(iter(ids)).namespace[::-1]))  # type: ignore[arg-type]


def test_a_page_of_another_model_never_matches(tmp_path: Path) -> None:
    with opened(tmp_path / "s", runtime=FakeRuntime(32, block_size=16)) as client:
        client.ask(TURNS[0], agent="a")
    with opened(tmp_path / "s", runtime=FakeRuntime(32, block_size=32)) as client:
        _, finished = client.ask(TURNS[0], agent="a")
    assert finished.usage.cached_tokens == 0


def test_a_block_that_is_deleted_on_its_way_is_not_found_when_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "s") as client:
        client.ask(TURNS[0], agent="a")
    store = BlockStore.open(tmp_path / "s", quota_nbytes=1 << 30)
    slow = SlowStore(store, monkeypatch)
    with opened(tmp_path / "s", store=store) as client:
        waiting = client.submit(TURNS[0], agent="b")
        assert slow.seen.acquire(timeout=20)
        keys = store.chain(store.agent("default", "a").id)
        client.engine.forget(keys)
        slow.release()
        assert waiting.finished().usage.disk_tokens > 0, "who waited for it gets it"
        assert not client.engine.is_resident(keys[0])
