"""Where the time of a reply went, as its end says."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

from tests.engine.harness import GREEDY, WAIT_S, GatedRuntime, opened

from dormouse.domain.requests import Timings
from dormouse.runtimes.fake import FakeRuntime
from dormouse.store.block_store import BlockStore

PROMPT = "a conversation that fills some blocks of sixteen tokens each"


class Ticking(FakeRuntime):
    """Takes a while for each step."""

    STEP_S = 0.02
    first_step_at = math.inf

    def forward(self, plan):  # type: ignore[no-untyped-def]
        self.first_step_at = min(self.first_step_at, time.monotonic())
        time.sleep(self.STEP_S)
        return super().forward(plan)


def total(timings: Timings) -> float:
    return timings.queued_s + timings.wake_s + timings.prefill_s + timings.decode_s


def test_the_phases_add_up(tmp_path: Path) -> None:
    runtime = Ticking(32)
    with opened(tmp_path, runtime=runtime, speculate=False) as client:
        begun = time.monotonic()
        timings = client.submit(PROMPT).finished().timings
        elapsed = time.monotonic() - begun
    assert timings.prefill_s >= Ticking.STEP_S
    assert timings.decode_s >= 7 * Ticking.STEP_S
    assert timings.wake_s == 0
    assert 0 <= timings.queued_s <= runtime.first_step_at - begun
    assert total(timings) <= elapsed


def test_waiting_for_a_turn_is_queueing(tmp_path: Path) -> None:
    runtime = GatedRuntime(32)
    with opened(tmp_path, runtime=runtime, max_running=1) as client:
        first = client.submit("first", replace(GREEDY, max_tokens=2))
        assert runtime.started.acquire(timeout=WAIT_S)
        second = client.submit("second", replace(GREEDY, max_tokens=2))
        time.sleep(Ticking.STEP_S)  # what is to be measured
        runtime.run_freely()
        assert second.finished().timings.queued_s >= Ticking.STEP_S
        assert first.finished().timings.prefill_s >= Ticking.STEP_S


def test_waking_has_a_time_of_its_own(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        client.ask(PROMPT)
    with opened(tmp_path) as client:
        finished = client.submit(PROMPT).finished()
    assert finished.usage.disk_tokens > 0
    assert finished.timings.wake_s > 0
    assert finished.timings.prefill_s > 0


def test_a_preemption_counts_where_it_interrupts(tmp_path: Path) -> None:
    store = BlockStore.open(tmp_path, quota_nbytes=1 << 30)
    with opened(tmp_path, runtime=Ticking(8), store=store, speculate=False) as client:
        begun = time.monotonic()
        calls = [client.submit(text, replace(GREEDY, max_tokens=80)) for text in ("first", "second")]
        ends = [call.finished() for call in calls]
        elapsed = time.monotonic() - begun
        assert client.engine.stats().preemptions
    for end in ends:
        assert end.timings.wake_s == 0
        assert 80 * Ticking.STEP_S * 0.9 <= total(end.timings) <= elapsed


def test_a_warm_up_is_all_prefill(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        timings = client.submit(PROMPT, replace(GREEDY, max_tokens=0)).finished().timings
    assert timings.prefill_s > 0
    assert timings.decode_s == 0
