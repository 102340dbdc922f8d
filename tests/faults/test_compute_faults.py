"""What goes wrong while a model computes: whom it costs what, and what the server says of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.faults.conftest import Serve
from tests.faults.faulty import BLOCK, Gate, Site, code_of, is_of, text_of

from dormouse.api import generation
from dormouse.domain.plan import Plan
from dormouse.engine.detokenizer import Detokenizer
from dormouse.engine.loop import MOST_FAILED
from dormouse.engine.options import EngineOptions
from dormouse.runtimes.base import Logits

DEADLINE_S = 3.0
"""For a step that hangs. It binds ordinary chats as well."""

NO_MEMORY = [MemoryError("no memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
LONG = "a prompt that is long enough for several blocks of sixteen tokens, and for several steps as well"


def raise_for(text: str, error: BaseException) -> Callable[[Plan], None]:
    """A hook that raises for every step with that prompt."""

    def hook(plan: Plan) -> None:
        if any(is_of(chunk, text) for chunk in plan.chunks):
            raise error

    return hook


def spoil(plan: Plan, logits: Logits, text: str, value: float) -> None:
    """Make one logit of that prompt's rows NaN or infinite, or all of them -inf."""
    first = 0
    for chunk in plan.chunks:
        if is_of(chunk, text):
            columns = slice(None) if value == -np.inf else 3
            logits[first : first + chunk.num_logits, columns] = value
        first += chunk.num_logits


def together(site: Site, *texts: str) -> list[str | None]:
    """What these chats say when they share their steps; None for one that fails."""
    gate = Gate()
    site.runtime.on_forward, then = gate.wait, site.runtime.on_forward
    with ThreadPoolExecutor(len(texts) + 1) as threads:
        first = threads.submit(site.chat, "opens the door")
        assert gate.reached.acquire(timeout=20)
        answers = [threads.submit(site.chat, text) for text in texts]
        site.until(lambda: site.engine.num_open == len(texts) + 1)
        site.runtime.on_forward = then
        gate.open()
        assert first.result().status_code == 200
        return [text_of(a.result()) if a.result().status_code == 200 else None for a in answers]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["python", "torch"])
def test_a_step_that_fails_once_costs_nobody_a_word(site: Site, error: Exception) -> None:
    alone = [text_of(site.chat(text)) for text in ("one", "two")]
    errors = [error]

    def once(plan: Plan) -> None:
        if len(plan.chunks) > 1 and errors:
            raise errors.pop()

    site.runtime.on_forward = once
    assert together(site, "one", "two") == alone
    assert not errors, "it did fail"
    assert site.logged(logging.ERROR, "each is tried alone")
    assert (site.status(), site.reasons()) == ("ok", set())
    assert site.metric("dormouse_replies_total", outcome="failed") == 0


@pytest.mark.parametrize("error", NO_MEMORY, ids=["python", "torch"])
def test_a_request_that_cannot_be_computed_fails_alone(site: Site, error: Exception) -> None:
    alone = [text_of(site.chat(text)) for text in ("one", "two")]
    site.runtime.on_forward = raise_for("bad", error)
    assert together(site, "one", "bad", "two") == [alone[0], None, alone[1]]
    assert (site.status(), site.reasons()) == ("ok", set()), "others were computed after it"
    answer = site.chat("bad again")
    assert (answer.status_code, code_of(answer)) == (500, "step_failed")
    assert "shorter prompt" in answer.text
    assert (site.status(), site.reasons()) == ("degraded", {"steps_failing"})
    assert site.metric("dormouse_replies_total", outcome="failed") == 2
    assert site.logged(logging.ERROR, "cannot be computed")
    assert text_of(site.chat("one")) == alone[0]
    assert (site.status(), site.reasons()) == ("ok", set())


def test_a_runtime_that_fails_for_good_is_dead_and_says_so(site: Site) -> None:
    def broken(_: Plan) -> None:
        raise RuntimeError("the device is gone")

    site.runtime.on_forward = broken
    codes = [code_of(site.chat(f"try {number}")) for number in range(MOST_FAILED)]
    assert codes == ["step_failed"] * MOST_FAILED
    answer = site.chat("after the end")
    assert (answer.status_code, code_of(answer)) == (500, "engine_dead")
    assert "the device is gone" in answer.text
    assert "restart" in answer.text
    assert (site.status(), site.reasons()) == ("dead", {"engine_dead", "steps_failing"})
    assert [site.http.get(f"/health/{probe}").status_code for probe in ("live", "ready")] == [503, 503]
    assert site.logged(logging.CRITICAL, "the engine loop died")
    assert site.metric("dormouse_replies_total", outcome="failed") == MOST_FAILED


class Panic(BaseException):
    """What a library in Rust raises."""


def test_a_panic_ends_the_loop_loudly_and_leaves_nobody_waiting(site: Site) -> None:
    def panic(_: Plan) -> None:
        raise Panic("index out of bounds")

    site.runtime.on_forward = panic
    answer = site.chat()
    assert (answer.status_code, code_of(answer)) == (500, "engine_dead")
    assert (site.status(), site.reasons()) == ("dead", {"engine_dead"})
    assert site.logged(logging.CRITICAL, "the engine loop died")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_fails_its_own_row(site: Site, value: float) -> None:
    alone = [text_of(site.chat(text)) for text in ("one", "two")]
    site.runtime.on_logits = lambda plan, logits: spoil(plan, logits, "bad", value)
    assert together(site, "one", "bad", "two") == [alone[0], None, alone[1]]
    answer = site.chat("bad again")
    assert (answer.status_code, code_of(answer)) == (500, "model_output_invalid")
    assert (site.status(), site.reasons()) == ("ok", set())
    assert site.metric("dormouse_replies_total", outcome="failed") == 2


def test_nothing_that_is_no_number_is_kept(serve: Serve) -> None:
    """Also where it shows in the middle of a prompt, long before the first token."""
    site = serve(options=EngineOptions(token_budget=2 * BLOCK))
    good = text_of(site.chat(LONG[::-1]))

    def later_chunks(plan: Plan, logits: Logits) -> None:
        first = 0
        for chunk in plan.chunks:
            if chunk.start >= 2 * BLOCK:
                logits[first : first + chunk.num_logits] = np.nan
            first += chunk.num_logits

    site.runtime.on_logits = later_chunks
    answer = site.chat(LONG, agent="ada")
    assert code_of(answer) == "model_output_invalid"
    assert site.store.flush()
    before, behind = site.keys(LONG)[:2], site.keys(LONG)[2:]
    assert len(behind) >= 3
    assert all(site.store.contains(key) and site.engine.is_resident(key) for key in before)
    assert not any(site.store.contains(key) or site.engine.is_resident(key) for key in behind)
    site.runtime.on_logits = lambda *_: None
    answer = site.chat(LONG, agent="ada")
    found = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 2 * BLOCK <= found < 3 * BLOCK
    assert text_of(answer) == text_of(site.chat(LONG)), "computed or found, it is the same"
    assert text_of(site.chat(LONG[::-1])) == good


def test_a_step_that_does_not_end(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients have their deadline, whatever the engine's thread does; it goes on when the step ends."""
    monkeypatch.setattr(generation, "LATE_S", 0.1)
    site = serve(deadline_s=DEADLINE_S)
    expected = text_of(site.chat())
    gate = Gate()
    site.runtime.on_forward = gate.wait
    try:
        answer = site.chat("stuck")
        assert (answer.status_code, code_of(answer)) == (503, "engine_stalled")
        assert "at one step" in answer.text
        site.until(lambda: site.metric("dormouse_engine_busy_seconds") > DEADLINE_S)
        refused = site.chat("refused")
        assert (refused.status_code, code_of(refused)) == (503, "engine_stalled")
        assert int(refused.headers["retry-after"]) > 0
        assert (site.status(), site.reasons()) == ("dead", {"engine_hung"})
        assert [site.http.get(f"/health/{probe}").status_code for probe in ("live", "ready")] == [503, 503]
        assert site.logged(logging.ERROR, "at one step")
    finally:
        site.runtime.on_forward = lambda _: None
        gate.open()
    site.until(lambda: site.status() == "ok")
    assert text_of(site.chat()) == expected
    assert site.engine.num_open == 0


def test_a_stream_ends_when_the_step_does_not(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "LATE_S", 0.1)
    site = serve(deadline_s=DEADLINE_S)
    gate = Gate()
    site.runtime.on_forward = gate.wait
    try:
        answer = site.chat("stuck", stream=True)
        assert "engine_stalled" in answer.text
        assert "[DONE]" not in answer.text, "it must not pass for a whole reply"
    finally:
        gate.open()


def test_pages_that_cannot_be_read_out_cost_durability_only(site: Site) -> None:
    errors = [MemoryError("no memory for a copy")] * 2

    def short(_: int) -> None:
        if errors:
            raise errors.pop()

    site.runtime.on_read_page = short
    said = text_of(site.chat(LONG, agent="ada"))
    assert not errors
    assert site.logged(logging.ERROR, "could not be read out")
    assert site.status() == "ok"
    assert site.store.flush()
    stats = site.store.stats()
    assert stats.num_history_only > 0
    assert (stats.num_agents, stats.num_unsaved_agents) == (1, 0)
    assert site.metric("dormouse_store_blocks") == stats.num_blocks >= 0
    assert site.http.get("/v1/agents/ada").json()["tokens"] > len(LONG), "the history needs no blocks"
    again = site.chat(LONG, agent="ada")
    assert text_of(again) == said
    assert site.store.flush()
    assert all(site.store.has_durable(key) for key in site.keys(LONG)), "offered again, and taken"


def test_a_block_that_cannot_be_taken_over_is_computed(serve: Serve) -> None:
    site = serve()
    said = text_of(site.chat(LONG, agent="ada"))
    assert site.store.flush()
    assert site.http.post("/v1/agents/ada/sleep").status_code == 200

    def short(_: int) -> None:
        raise MemoryError("no memory on the device")

    site.runtime.on_page_loaded = short
    answer = site.chat(LONG, agent="ada")
    assert text_of(answer) == said
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert site.logged(logging.ERROR, "was read in vain")
    assert site.status() == "ok"


def test_a_reply_that_cannot_be_decoded_fails_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = text_of(site.chat("one"))
    with monkeypatch.context() as patch:
        patch.setattr(Detokenizer, "step", lambda *_: 1 / 0)
        answer = site.chat("two")
        assert answer.status_code == 500
        assert "could not be decoded" in answer.text
    assert text_of(site.chat("one")) == expected
    assert site.logged(logging.ERROR, "cannot go on")
    assert site.status() == "ok"


def test_a_thread_that_cannot_be_started(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit of the system's threads: refused with what to do, and served when there is room."""
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if thread.name == "prompts":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        answer = site.chat()
        assert answer.status_code == 503
        assert "retry" in answer.text
        assert site.logged(logging.ERROR, "no thread for prompts could be started")
    assert site.chat().status_code == 200
    assert site.status() == "ok"
