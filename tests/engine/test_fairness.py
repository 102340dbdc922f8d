"""What the engine owes to many at once: turns, room, and an answer to everyone."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from tests.engine.harness import GREEDY, WAIT_S, Call, Client, GatedRuntime, opened

from dormouse.domain.errors import QueueFull
from dormouse.domain.requests import Finished, Priority
from dormouse.engine.queue import MAINS_PER_SIDE, MOST_OVERTAKEN, Queue
from dormouse.engine.sequence import Sequence
from dormouse.store.block_store import BlockStore

BLOCK = 16
LONG = "a dormouse sleeps for more than half of the year, and what it dreamt of it tells nobody at all"
SIDE = Priority.SIDE


class Ends:
    """Who ended, in order."""

    def __init__(self, client: Client, runtime: GatedRuntime) -> None:
        self.names: list[str] = []
        self._client = client
        self._calls: dict[str, Call] = {}
        self._runtime = runtime

    def submit(self, name: str, *, prompt: str = "", max_tokens: int = 2, **fields: object) -> None:
        call = self._client.submit(
            prompt or name,
            replace(GREEDY, max_tokens=max_tokens),
            **fields,  # type: ignore[arg-type]
        )
        self._calls[call.request.id] = call
        take = call.request.sink
        ids = {call.request.id: name}

        def sink(event: object) -> None:
            if isinstance(event, Finished):
                self.names.append(ids[call.request.id])
            take(event)  # type: ignore[arg-type]

        object.__setattr__(call.request, "sink", sink)

    def wait(self) -> list[str]:
        self._runtime.run_freely()
        for call in self._calls.values():
            call.finished()
        return self.names


def test_a_queue_of_one_agent_does_not_stand_before_another_agent(tmp_path: Path) -> None:
    runtime = GatedRuntime(64)
    with opened(tmp_path, runtime=runtime, max_running=1) as client:
        ends = Ends(client, runtime)
        for i in range(30):
            ends.submit(f"greedy {i}", agent="greedy")
        ends.submit("modest", agent="modest")
        order = ends.wait()
    assert order.index("modest") <= 2


def test_a_tenant_of_many_agents_does_not_stand_before_another_tenant(tmp_path: Path) -> None:
    runtime = GatedRuntime(64)
    with opened(tmp_path, runtime=runtime, max_running=1) as client:
        ends = Ends(client, runtime)
        for i in range(30):
            ends.submit(f"one {i}", agent=f"agent {i}", tenant="one")
        ends.submit("other", tenant="other")
        order = ends.wait()
    assert order.index("other") <= 2


def test_side_requests_come_after_main_ones_and_come(tmp_path: Path) -> None:
    runtime = GatedRuntime(64)
    with opened(tmp_path, runtime=runtime, max_running=1) as client:
        ends = Ends(client, runtime)
        ends.submit("first")
        for i in range(3):
            ends.submit(f"side {i}", priority=SIDE, agent=f"s{i}")
        for i in range(12):
            ends.submit(f"main {i}", agent=f"m{i}")
        order = ends.wait()
    places = [order.index(f"side {i}") for i in range(3)]
    assert all(place >= MAINS_PER_SIDE for place in places), "main ones came first"
    assert all(b - a == MAINS_PER_SIDE + 1 for a, b in pairwise(places)), places


def test_a_main_request_takes_the_place_of_a_side_one_which_ends_all_the_same(tmp_path: Path) -> None:
    with opened(tmp_path / "alone") as client:
        alone, _ = client.ask("a title", max_tokens=40)
    runtime = GatedRuntime(64)
    with opened(tmp_path / "busy", runtime=runtime, max_running=1) as client:
        side = client.submit("a title", replace(GREEDY, max_tokens=40), priority=SIDE)
        assert runtime.started.acquire(timeout=20)
        mains = [client.submit(LONG[i:], agent=f"m{i}") for i in range(5)]
        runtime.run_freely()
        for main in mains:
            main.finished()
        side.finished()
        # Twice at most: then it stands as main ones do.
        assert 1 <= client.engine.stats().preemptions <= 2
    assert side.text == alone


def test_pages_are_taken_back_from_side_requests_first(tmp_path: Path) -> None:
    runtime = GatedRuntime(8)
    with opened(tmp_path, runtime=runtime) as client:
        main = client.submit("m" * 30, replace(GREEDY, max_tokens=70))
        assert runtime.started.acquire(timeout=20)
        side = client.submit("s" * 30, replace(GREEDY, max_tokens=40), priority=SIDE)
        late = client.submit("t" * 20, replace(GREEDY, max_tokens=10))
        runtime.run_freely()
        for call in (main, side, late):
            call.finished()
        assert client.engine.stats().preemptions >= 1
    # A prompt computed twice is one that was preempted.
    starts = [chunk.start for plan in runtime.plans for chunk in plan.chunks if chunk.tokens[0] == ord("m")]
    assert starts.count(0) == 1


def test_side_requests_do_not_push_a_main_conversation_out_of_memory(tmp_path: Path) -> None:
    with opened(tmp_path, num_pages=16) as client:
        client.ask(LONG, agent="main")
        for i in range(20):
            client.submit(f"{i:03} is the title of what", priority=SIDE).finished()
        _, again = client.ask(LONG, agent="main")
    assert again.usage.memory_tokens == len(LONG) - 1


def test_what_main_and_side_requests_share_stays(tmp_path: Path) -> None:
    with opened(tmp_path, num_pages=16) as client:
        client.ask(LONG, agent="main")
        client.submit(LONG, priority=SIDE).finished()
        for i in range(20):
            client.submit(f"{i:03} is the title of what", priority=SIDE).finished()
        _, again = client.ask(LONG, agent="main")
    assert again.usage.memory_tokens == len(LONG) - 1


def test_small_requests_overtake_one_that_does_not_fit_but_not_for_ever(tmp_path: Path) -> None:
    runtime = GatedRuntime(16)
    with opened(tmp_path, runtime=runtime, max_running=3) as client:
        ends = Ends(client, runtime)
        ends.submit("stream", prompt="s" * BLOCK * 5, max_tokens=60, agent="stream")
        assert runtime.started.acquire(timeout=20)
        ends.submit("big", prompt="b" * BLOCK * 12, agent="big")
        for i in range(40):
            ends.submit(f"small {i}", agent=f"small {i}")
        order = ends.wait()
    before = [name for name in order[: order.index("big")] if name.startswith("small")]
    # Two of them may run beside the big one once it was admitted.
    assert 1 <= len(before) <= MOST_OVERTAKEN + 2


@pytest.mark.parametrize("num_pages", [8, 10])
def test_preemption_does_not_always_hit_the_same(
    tmp_path: Path, num_pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hit: Counter[str | None] = Counter()

    def put_back(queue: Queue, sequence: Sequence) -> None:
        hit[sequence.request.agent] += 1
        original(queue, sequence)

    original = Queue.put_back
    monkeypatch.setattr(Queue, "put_back", put_back)
    runtime = GatedRuntime(num_pages)
    with opened(tmp_path, runtime=runtime) as client:
        prompts = [f"{name}" * 20 for name in "abcd"]
        calls = [client.submit(p, replace(GREEDY, max_tokens=70), agent=p[0]) for p in prompts]
        runtime.run_freely()
        for call in calls:
            call.finished()
    assert hit["a"] == 0, "the oldest goes on"
    hits = [count for count in hit.values() if count]
    assert len(hits) >= 2
    assert max(hits) <= min(hits) + 1


@pytest.mark.parametrize("side", [False, True])
def test_a_flood_is_answered_or_refused_and_leaves_nothing_behind(tmp_path: Path, side: bool) -> None:
    """200 clients, an arena for about five of them."""
    params = replace(GREEDY, max_tokens=24)
    prompts = [f"client {i:03}: {LONG[i % 40 :]}" for i in range(200)]
    with opened(tmp_path / "alone", num_pages=256) as client:
        alone = [client.submit(prompt, params) for prompt in prompts]
        for call in alone:
            call.finished()
    store = BlockStore.open(tmp_path / "flood", quota_nbytes=1 << 30)
    options = {"num_pages": 48, "max_queue": 100, "max_running": 16}
    with opened(tmp_path / "flood", store=store, **options) as client:  # type: ignore[arg-type]
        client.ask(LONG)
        store.flush()
        before = _resources()
        accepted: dict[int, Call] = {}
        waits: list[int] = []
        for i, prompt in enumerate(prompts):
            priority = SIDE if side and i % 3 == 0 else Priority.MAIN
            try:
                accepted[i] = client.submit(prompt, params, agent=f"agent {i % 50}", priority=priority)
            except QueueFull as refused:
                waits.append(refused.retry_after_s)
        for i, call in accepted.items():
            finished = call.finished()
            assert (call.text, len(finished.tokens)) == (alone[i].text, params.max_tokens), f"client {i}"
        assert len(accepted) >= 116, "the queue and the running ones"
        assert all(1 <= wait <= 60 for wait in waits)
        stats = client.engine.stats()
        assert (stats.pages_used, stats.num_waiting, stats.num_running) == (0, 0, 0)
        store.flush()
        # A file that is read ahead for nobody any more may still be open for a moment.
        deadline = time.monotonic() + WAIT_S
        while _more_than(before, _resources()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not _more_than(before, _resources())


def _more_than(before: tuple[int, int], now: tuple[int, int]) -> bool:
    return now[0] > before[0] or now[1] > before[1]


def _resources() -> tuple[int, int]:
    """Threads, and open files."""
    gc.collect()
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))


def test_each_who_is_refused_is_told_of_a_place_of_its_own(tmp_path: Path) -> None:
    runtime = GatedRuntime(64)
    with opened(tmp_path, runtime=runtime, max_running=1, max_queue=1) as client:
        calls = [client.submit(LONG), client.submit(LONG)]
        waits = []
        for _ in range(80):
            with pytest.raises(QueueFull) as refused:
                client.submit(LONG)
            waits.append(refused.value.retry_after_s)
        runtime.run_freely()
        for call in calls:
            call.finished()
    assert waits == sorted(waits)
    assert len(set(waits)) > 30, "they do not all come back at once"
    assert waits[-1] == 60


def test_a_warm_up_computes_a_prompt_once_and_next_to_nothing_again(tmp_path: Path) -> None:
    with opened(tmp_path, num_pages=64) as client:
        nothing = replace(GREEDY, max_tokens=0)
        first = client.submit(LONG, nothing, agent="a", priority=SIDE)
        assert (first.finished().usage.cached_tokens, first.finished().tokens) == (0, ())
        computed = client.engine.stats().computed_tokens
        again = client.submit(LONG, nothing, agent="a", priority=SIDE).finished()
        assert (again.usage.memory_tokens, again.tokens) == (len(LONG) - 1, ())
        assert client.engine.stats().computed_tokens == computed + 1
        assert first.text == ""
    with opened(tmp_path, num_pages=64) as client:
        _, woken = client.ask(LONG + " more", agent="a")
    assert woken.usage.disk_tokens == len(LONG), "all of it was stored"
