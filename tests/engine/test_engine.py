"""The engine as its callers see it: answers, order, reuse, limits and ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.engine.harness import GREEDY, WAIT_S, GatedRuntime, opened

from dormouse.domain.errors import (
    AgentNotFound,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineDead,
    InvalidRequest,
    ModelOutputInvalid,
    QueueFull,
    ShuttingDown,
)
from dormouse.domain.plan import Plan
from dormouse.domain.requests import FinishReason, SamplingParams, TextDelta, TokenLogprob
from dormouse.runtimes.base import Logits
from dormouse.runtimes.fake import VOCAB_SIZE, ByteDecoder, FakeRuntime, encode
from dormouse.store.block_store import BlockStore

LONG = "the quick brown fox jumps over the lazy dog, and then it sleeps for a long winter"


def test_a_reply_depends_on_its_past_alone(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as client:
        alone, _ = client.ask(LONG)
    with opened(tmp_path / "b", token_budget=7) as client:
        calls = [client.submit(LONG[i:], GREEDY) for i in (3, 0, 5)]
        texts = [(call.finished(), call.text)[1] for call in calls]
    assert texts[1] == alone
    assert len(set(texts)) == 3


def test_max_tokens_and_usage(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        text, finished = client.ask("hello", max_tokens=5)
    assert len(text) == 5
    assert finished.reason is FinishReason.LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (5, 5)


def test_no_tokens_only_warms_up(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        text, finished = client.ask(LONG, max_tokens=0, agent="a")
        assert (text, finished.usage.completion_tokens) == ("", 0)
        _, again = client.ask(LONG, agent="a")
    assert again.usage.memory_tokens == len(LONG) - 1


def test_stop_strings_end_the_reply(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        whole, _ = client.ask(LONG, max_tokens=30)
        stop = whole[10:13]
        call = client.submit(LONG, replace(GREEDY, max_tokens=30, stop=(stop,)))
        finished = call.finished()
    assert call.text == whole[: whole.index(stop)]
    assert (finished.reason, finished.stop) == (FinishReason.STOP, stop)


def test_a_prompt_is_reused_to_the_token(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        text, cold = client.ask(LONG)
        again, warm = client.ask(LONG)
        _, head = client.ask(LONG[:41] + "something else")
    assert cold.usage.cached_tokens == 0
    assert (again, warm.usage.memory_tokens) == (text, len(LONG) - 1)
    assert head.usage.memory_tokens == 41, "divergence inside a block reuses the head of that block"


def test_a_conversation_computes_only_what_is_new(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        text, _ = client.ask(LONG, agent="a")
        _, second = client.ask(LONG + text + " and then?", agent="a")
    assert second.usage.memory_tokens == len(LONG + text) - 1, "all but the last sampled token"


def test_tenants_do_not_share(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        client.submit(LONG, tenant="one").finished()
        assert client.submit(LONG, tenant="two").finished().usage.cached_tokens == 0
        assert client.submit(LONG, tenant="one").finished().usage.cached_tokens == len(LONG) - 1


def test_new_requests_join_while_others_decode(tmp_path: Path) -> None:
    runtime = GatedRuntime(32)
    with opened(tmp_path, runtime=runtime) as client:
        first = client.submit("first", replace(GREEDY, max_tokens=20))
        assert runtime.started.acquire(timeout=20)
        second = client.submit("second", replace(GREEDY, max_tokens=20))
        runtime.run_freely()
        first.finished()
        second.finished()
    assert max(len(plan.chunks) for plan in runtime.plans) == 2


def test_a_long_prompt_never_stalls_a_stream(tmp_path: Path) -> None:
    runtime = GatedRuntime(64)
    with opened(tmp_path, runtime=runtime, token_budget=16) as client:
        stream = client.submit("short", replace(GREEDY, max_tokens=30))
        assert runtime.started.acquire(timeout=20)
        long = client.submit(LONG * 4)
        runtime.run_freely()
        stream.finished()
        long.finished()
    prefilling = [p for p in runtime.plans if any(len(c.tokens) > 1 and c.start > 0 for c in p.chunks)]
    assert len(prefilling) > 10
    assert all(any(len(c.tokens) == 1 for c in plan.chunks) for plan in prefilling[:10])
    assert all(plan.num_tokens <= 16 + len(plan.chunks) for plan in runtime.plans)


def test_short_prompts_are_not_stuck_behind_a_long_one(tmp_path: Path) -> None:
    runtime = GatedRuntime(128)
    with opened(tmp_path, runtime=runtime, token_budget=32) as client:
        long = client.submit(LONG * 10, replace(GREEDY, max_tokens=1))
        assert runtime.started.acquire(timeout=20)
        short = client.submit("0123456789", replace(GREEDY, max_tokens=1))
        runtime.run_freely()
        short.finished()
        assert long.end is None
        long.finished()
    done = next(i for i, plan in enumerate(runtime.plans) if any(len(c.tokens) == 10 for c in plan.chunks))
    assert done <= 3


@pytest.mark.parametrize("num_pages", [8, 9, 12])
def test_preempted_requests_finish_as_unpreempted_ones_do(tmp_path: Path, num_pages: int) -> None:
    prompts = [LONG[i : i + 40] for i in range(5)]
    params = replace(GREEDY, max_tokens=60)
    with opened(tmp_path / "roomy", num_pages=64) as client:
        expected = []
        for prompt in prompts:
            call = client.submit(prompt, params)
            call.finished()
            expected.append(call.text)
    tight = GatedRuntime(num_pages)
    with opened(tmp_path / "tight", runtime=tight) as client:
        calls = [client.submit(prompt, params, agent=f"a{i}") for i, prompt in enumerate(prompts)]
        tight.run_freely()
        for call in calls:
            call.finished()
        assert client.engine.stats().preemptions > 0
    assert [call.text for call in calls] == expected


def test_a_seeded_stream_survives_preemption(tmp_path: Path) -> None:
    params = SamplingParams(seed=5, max_tokens=60)
    with opened(tmp_path / "roomy") as client:
        alone = client.submit(LONG[:40], params)
        alone.finished()
    tight = GatedRuntime(8)
    with opened(tmp_path / "tight", runtime=tight) as client:
        others = [client.submit(LONG[i : i + 40], params) for i in (1, 2)]
        call = client.submit(LONG[:40], params)
        tight.run_freely()
        call.finished()
        for other in others:
            other.finished()
        assert client.engine.stats().preemptions > 0
    assert call.text == alone.text


def stepped(runtime: GatedRuntime, done: Callable[[], bool]) -> None:
    """Compute steps, one by one, until `done`."""
    deadline = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < deadline
        if runtime.started.acquire(timeout=0.05):
            runtime.allow.release()


def test_nothing_stays_of_an_agent_that_is_deleted_while_it_is_preempted(tmp_path: Path) -> None:
    store = BlockStore.open(tmp_path, quota_nbytes=1 << 30)
    tight = GatedRuntime(8)
    params = replace(GREEDY, max_tokens=60)
    with opened(tmp_path, runtime=tight, store=store) as client, ThreadPoolExecutor() as pool:
        # The first one needs its fifth page while the other one is within its fourth.
        first = client.submit(LONG[:49], params, agent="a")
        other = client.submit(LONG[1:41], params, agent="b")
        stepped(tight, lambda: client.engine.stats().preemptions > 0)
        abandoned = pool.submit(client.engine.abandon, "default", "b")
        stepped(tight, abandoned.done)
        tight.run_freely()
        assert isinstance(other.failed().error, AgentNotFound)
        keys = abandoned.result()
        assert keys is not None
        first.finished()
        assert store.flush()
        store.admin.discard(keys)
        store.delete_agent("default", "a")
        assert store.stats().num_blocks == 0


def test_an_abandoned_reply_without_a_full_block_was_one(tmp_path: Path) -> None:
    runtime = GatedRuntime(8)
    with opened(tmp_path, runtime=runtime, max_running=1) as client, ThreadPoolExecutor() as pool:
        assert client.engine.abandon("default", "b") is None
        client.submit(LONG[:40], replace(GREEDY, max_tokens=60), agent="a")
        call = client.submit("short", agent="b")
        abandoned = pool.submit(client.engine.abandon, "default", "b")
        stepped(runtime, abandoned.done)
        runtime.run_freely()
        assert abandoned.result() == []
        assert isinstance(call.failed().error, AgentNotFound)


def test_what_can_never_fit_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with opened(tmp_path, num_pages=4) as client:
        assert client.engine.max_length == 48
        with pytest.raises(ContextLengthExceeded, match=r"81 tokens > 47 maximum \(the arena"):
            client.submit(LONG)
        text, finished = client.ask(LONG[:47], max_tokens=50)
        assert (len(text), finished.reason) == (1, FinishReason.LENGTH), "clamped to the room that is left"
    with (
        opened(tmp_path, runtime=FakeRuntime(64, context_length=64)) as client,
        pytest.raises(ContextLengthExceeded, match="the model's context"),
    ):
        client.submit(LONG)


def test_bad_prompts_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        with pytest.raises(InvalidRequest, match="empty"):
            client.submit("")
        with pytest.raises(InvalidRequest, match="outside"):
            client.submit([VOCAB_SIZE])


def test_a_full_queue_refuses_and_recovers(tmp_path: Path) -> None:
    runtime = GatedRuntime(32)
    with opened(tmp_path, runtime=runtime, max_queue=1, max_running=2) as client:
        calls = [client.submit(LONG[i:]) for i in range(3)]
        with pytest.raises(QueueFull) as refused:
            client.submit(LONG)
        assert refused.value.retry_after_s >= 1
        runtime.run_freely()
        for call in calls:
            call.finished()
        client.ask(LONG)


def test_a_deadline_cuts_a_running_and_a_waiting_request(tmp_path: Path) -> None:
    runtime = GatedRuntime(32)
    with opened(tmp_path, runtime=runtime, max_running=1) as client:
        running = client.submit(LONG, replace(GREEDY, max_tokens=400), deadline_s=1.0)
        waiting = client.submit(LONG, deadline_s=1.0)
        runtime.allow.release(2)
        assert runtime.started.acquire(timeout=WAIT_S)
        threading.Event().wait(1.1)
        runtime.run_freely()
        assert isinstance(running.failed().error, DeadlineExceeded)
        assert isinstance(waiting.failed().error, DeadlineExceeded)
        client.ask("still here")


def test_an_aborted_request_frees_its_pages_and_keeps_its_blocks(tmp_path: Path) -> None:
    runtime = GatedRuntime(32)
    with opened(tmp_path, runtime=runtime, token_budget=32) as client:
        call = client.submit(LONG, replace(GREEDY, max_tokens=400), agent="a")
        runtime.allow.release(2)
        for _ in range(3):
            assert runtime.started.acquire(timeout=20)
        client.engine.abort(call.request.id)
        runtime.run_freely()
        _, again = client.ask(LONG)
        assert client.engine.stats().pages_used == 0
    assert again.usage.memory_tokens >= 64
    assert call.end is None, "nobody listens any more"


def test_aborting_what_is_unknown_or_waiting_is_harmless(tmp_path: Path) -> None:
    runtime = GatedRuntime(32)
    with opened(tmp_path, runtime=runtime, max_running=1) as client:
        first = client.submit(LONG)
        waiting = client.submit(LONG)
        client.engine.abort(waiting.request.id)
        client.engine.abort("no such request")
        runtime.run_freely()
        first.finished()
        assert client.engine.stats().num_waiting == 0


def test_two_requests_of_one_agent_at_once_are_both_answered(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        expected, _ = client.ask(LONG)
        calls = [client.submit(LONG, agent="a") for _ in range(2)]
        for call in calls:
            call.finished()
    assert [call.text for call in calls] == [expected, expected]


def test_logprobs_come_with_the_tokens(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        call = client.submit(LONG, replace(GREEDY, top_logprobs=3))
        entries: list[TokenLogprob] = []
        while call.end is None:
            event = call.next()
            if isinstance(event, TextDelta):
                entries += event.logprobs
    assert bytes(entry.token_id for entry in entries).decode("latin-1") == call.text
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in entries), "greedy takes the top"


def test_stopping_lets_running_requests_finish(tmp_path: Path) -> None:
    runtime = GatedRuntime(32)
    with opened(tmp_path, runtime=runtime) as client:
        call = client.submit(LONG)
        stopper = threading.Thread(target=client.engine.stop, args=(20.0,))
        stopper.start()
        runtime.run_freely()
        call.finished()
        stopper.join(20)
        with pytest.raises(ShuttingDown):
            client.submit(LONG)


def test_the_end_of_the_grace_period_cuts_and_saves(tmp_path: Path) -> None:
    runtime = GatedRuntime(32)
    with opened(tmp_path, runtime=runtime) as client:
        call = client.submit(LONG, replace(GREEDY, max_tokens=400), agent="a")
        assert runtime.started.acquire(timeout=20)
        stopper = threading.Thread(target=client.engine.stop, args=(0.0,))
        stopper.start()
        runtime.step_until_ended(stopper)
        assert isinstance(call.failed().error, ShuttingDown)
    with opened(tmp_path) as client:
        _, woken = client.ask(LONG, agent="a")
    assert woken.usage.disk_tokens == len(LONG) - 1


class DyingRuntime(FakeRuntime):
    def copy_page(self, source: int, target: int, num_tokens: int) -> None:
        raise MemoryError(f"no memory to copy {num_tokens} rows from {source} to {target}")


def test_a_dead_loop_fails_everyone_loudly(tmp_path: Path) -> None:
    with opened(tmp_path, runtime=DyingRuntime(32)) as client:
        client.submit(LONG).finished()
        call = client.submit(f"{LONG} again")
        assert isinstance(call.failed().error, EngineDead)
        with pytest.raises(EngineDead, match="no memory"):
            client.submit(LONG)
        assert client.engine.death is not None


def test_a_request_that_cannot_be_started_is_answered(tmp_path: Path) -> None:
    decoders = iter([ByteDecoder])

    def broken() -> ByteDecoder:
        return next(decoders)()

    with opened(tmp_path, new_decoder=broken) as client:
        good = client.submit(LONG)
        bad = [client.submit("x"), client.submit("y")]
        for call in bad:
            assert "could not be started" in str(call.failed().error)
        good.finished()


def test_a_reply_that_cannot_be_saved_is_still_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlockStore.open(tmp_path, quota_nbytes=1 << 30)
    with opened(tmp_path, store=store) as client:
        with monkeypatch.context() as broken:
            broken.setattr(store, "save_agent", None)
            client.ask(LONG, agent="a")
        client.ask(LONG, agent="a")


def test_a_deadline_without_end_is_fine(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        client.submit(LONG, deadline_s=float("inf")).finished()


def test_logprobs_of_a_stop_string_do_not_leak(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        whole, _ = client.ask(LONG, max_tokens=30)
        call = client.submit(LONG, replace(GREEDY, max_tokens=30, stop=(whole[10:13],), top_logprobs=0))
        entries: list[TokenLogprob] = []
        while call.end is None:
            event = call.next()
            if isinstance(event, TextDelta):
                entries += event.logprobs
    assert bytes(entry.token_id for entry in entries).decode("latin-1") == call.text


class NaNRuntime(FakeRuntime):
    """Computes NaN for sequences that begin with an N."""

    def forward(self, plan: Plan) -> Logits:
        logits = super().forward(plan)
        wanting = [chunk for chunk in plan.chunks if chunk.num_logits]
        for row, chunk in zip(logits, wanting, strict=True):
            if chunk.tokens[0] == encode("N")[0]:
                row[3] = np.nan
        return logits


def test_nan_fails_its_own_request_only(tmp_path: Path) -> None:
    with opened(tmp_path, runtime=NaNRuntime(32)) as client:
        good, bad = client.submit("good"), client.submit("N bad")
        error = bad.failed().error
        assert isinstance(error, ModelOutputInvalid)
        assert "--dtype fp32" in str(error), "it says what to do"
        good.finished()
