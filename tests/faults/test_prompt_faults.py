"""Prompts and grammars that take too long, and tenants that ask too much: others are served."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher
from tests.faults.conftest import Serve
from tests.faults.faulty import WAIT_S, Gate, code_of, text_of
from tokenizers import Tokenizer

from dormouse.api import services
from dormouse.api.edge import Edge
from dormouse.api.keys import KeyFile, KeyRing
from dormouse.domain.constraint import Constraint
from dormouse.domain.conversation import Conversation, Message, OutputFormat, Role
from dormouse.domain.errors import PromptStalled, QueueFull
from dormouse.domain.places import Places
from dormouse.engine.options import EngineOptions
from dormouse.models import grammars as grammars_module
from dormouse.models.chat import ChatModel
from dormouse.models.family import Family
from dormouse.models.folder import TOKENIZER, ModelFolder
from dormouse.models.grammars import Grammars
from dormouse.models.rendering import Accepts
from dormouse.models.tool_formats.hermes import Hermes
from dormouse.models.workers import Workers

NO_TIME_S = 1.0
"""For who hangs. It binds the others as well: enough for an ordinary prompt on a busy machine."""

FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
STRICT = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}, "strict": True}}


@pytest.fixture
def slow_tokenizer(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Holds prompts with a snail in them."""
    gate = Gate()
    encode = ChatModel.encode_prompt

    def slow(chat: ChatModel, text: str, tenant: str) -> list[int]:
        if "snail" in text:
            gate.wait()
        return encode(chat, text, tenant)

    monkeypatch.setattr(ChatModel, "encode_prompt", slow)
    return gate


@pytest.fixture
def slow_grammars(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Holds every compilation."""
    gate = Gate()
    constrain = Grammars.constraint

    def slow(me: Grammars, asked: Conversation, prompt: str, tenant: str) -> Constraint | None:
        gate.wait()
        return constrain(me, asked, prompt, tenant)

    monkeypatch.setattr(Grammars, "constraint", slow)
    return gate


def test_a_prompt_that_takes_too_long_holds_up_nobody(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, slow_tokenizer: Gate
) -> None:
    monkeypatch.setattr(services, "PROMPT_TIMEOUT_S", NO_TIME_S)
    site = serve()
    expected = text_of(site.chat())
    try:
        answer = site.chat("a snail")
        assert (answer.status_code, code_of(answer)) == (503, "prompt_stalled")
        assert "send less" in answer.text
        assert int(answer.headers["retry-after"]) > 0
        assert text_of(site.chat()) == expected, "on another thread"
        assert (site.status(), site.reasons()) == ("degraded", {"prompts_stalled"})
        assert site.logged(logging.ERROR, "the prompt was given up")
    finally:
        slow_tokenizer.open()
    site.until_well()
    assert text_of(site.chat("a snail"))


def test_who_waits_behind_slow_prompts_is_told_so(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, slow_tokenizer: Gate
) -> None:
    """More prompts hang than threads are replaced: the rest has its deadline, and a reason to come back."""
    monkeypatch.setattr(services, "PROMPT_TIMEOUT_S", NO_TIME_S)
    site = serve()
    try:
        codes = [code_of(site.chat("a snail")) for _ in range(5)]
        assert set(codes) == {"prompt_stalled"}
        waited = site.chat("quick")
        assert (waited.status_code, code_of(waited)) == (503, "prompt_stalled")
        assert "wait for others" in waited.text
        assert "prompts_stalled" in site.reasons()
    finally:
        slow_tokenizer.open()
    site.until_well()
    assert site.chat("quick").status_code == 200


def test_a_grammar_that_explodes(serve: Serve, monkeypatch: pytest.MonkeyPatch, slow_grammars: Gate) -> None:
    monkeypatch.setattr(services, "GRAMMAR_TIMEOUT_S", NO_TIME_S)
    site = serve()
    expected = text_of(site.chat())
    try:
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(site.chat, "strict", response_format=STRICT)
            assert slow_grammars.reached.acquire(timeout=WAIT_S)
            assert text_of(site.chat()) == expected, "while it compiles"
            answer = asked.result()
        assert answer.status_code == 400
        assert "simplify it, or leave 'strict' out" in answer.text
        assert site.reasons() == {"grammars_stalled"}
        assert site.chat("loose", response_format=FORMAT).status_code == 200
        assert site.logged(logging.WARNING, "goes on without its grammar")
        assert text_of(site.chat()) == expected
    finally:
        slow_grammars.open()
    site.until_well()
    # The first real compilation has no more time than those that hang; once it is made, it is found.
    site.until(lambda: site.chat("strict", response_format=STRICT, max_tokens=3).status_code == 200)
    assert int(text_of(site.chat("strict", response_format=STRICT, max_tokens=3))) is not None


def test_a_compiler_that_is_busy_is_not_the_fault_of_a_schema(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, slow_grammars: Gate
) -> None:
    """Those who come behind exploding grammars are told to come back, not that theirs is wrong."""
    monkeypatch.setattr(services, "GRAMMAR_TIMEOUT_S", NO_TIME_S)
    site = serve()
    try:
        while "wait for others" not in (answer := site.chat(response_format=STRICT)).text:
            assert answer.status_code == 400
        assert (answer.status_code, code_of(answer)) == (503, "prompt_stalled")
    finally:
        slow_grammars.open()


def test_compiled_grammars_are_each_tenants_own(
    smollm2: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the time of an answer would tell one tenant that another has sent the same schema."""
    compiled: list[str] = []

    class Counting:
        grammar_from_json_schema = staticmethod(LLMatcher.grammar_from_json_schema)

        def __new__(cls, tokenizer: Any, grammar: str, **options: Any) -> Any:
            compiled.append(grammar)
            return LLMatcher(tokenizer, grammar, **options)

    monkeypatch.setattr(grammars_module, "LLMatcher", Counting)
    tokenizer = Tokenizer.from_file(str(smollm2.path / TOKENIZER))
    grammars = Grammars(tokenizer, frozenset({2}), Family(Accepts(), Hermes(), None))
    asked = Conversation((Message(Role.USER, "Go."),), format=OutputFormat({"type": "boolean"}))
    assert grammars.constraint(asked, "", "acme") is not None
    first = list(compiled)
    assert grammars.constraint(asked, "", "acme") is not None
    assert compiled == first, "what was compiled for a tenant is found"
    assert grammars.constraint(asked, "", "other") is not None
    assert compiled == first * 2, "and by no other one"


# -- fair shares ---------------------------------------------------------------------------------


def test_one_tenant_alone_has_all_the_room() -> None:
    places = Places(8)
    assert [places.take("one") for _ in range(10)] == [True] * 8 + [False] * 2
    places.give_back("one")
    assert places.take("one")


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans()), max_size=200), st.integers(1, 12))
def test_who_floods_never_keeps_out_a_newcomer(steps: list[tuple[str, bool]], room: int) -> None:
    places = Places(room)
    held = dict.fromkeys("abcdefgh", 0)
    for tenant, takes in steps:
        if takes:
            held[tenant] += places.take(tenant)
        elif held[tenant]:
            places.give_back(tenant)
            held[tenant] -= 1
        assert len(places) == sum(held.values()) <= 2 * room
        holders = sum(count > 0 for count in held.values())
        if len(places) < room or holders < room.bit_length():
            assert places.take("a newcomer"), (held, room)
            places.give_back("a newcomer")


def test_a_tenant_that_floods_is_refused_and_another_is_not(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o700)
    keys = KeyFile(tmp_path / "data")
    greedy, modest = keys.add("greedy"), keys.add("modest")
    admin = keys.add("admin", is_admin=True)
    site = serve(
        around=Edge(keys=KeyRing(tmp_path / "data")), options=EngineOptions(max_running=2, max_queue=6)
    )
    site.http.headers["x-api-key"] = admin
    gate = Gate()
    site.runtime.on_forward = gate.wait

    def ask(key: str, text: str) -> httpx.Response:
        body = {"model": "fake", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
        return httpx.post(
            f"{site.url}/v1/chat/completions", json=body, headers={"x-api-key": key}, timeout=WAIT_S
        )

    with ThreadPoolExecutor(16) as threads:
        flood = [threads.submit(ask, greedy, f"flood {number}") for number in range(8)]
        site.until(lambda: site.engine.num_open == 8)
        refused = ask(greedy, "one more")
        assert (refused.status_code, code_of(refused)) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        assert "queue_nearly_full" in site.reasons()
        other = threads.submit(ask, modest, "a single one")
        site.until(lambda: site.engine.num_open == 9)
        gate.open()
        assert other.result().status_code == 200
        assert {answer.result().status_code for answer in flood} == {200}
    assert site.metric("dormouse_requests_total", status="429") == 1
    assert site.reasons() == set()


def test_prompts_of_a_flood_take_turns_with_others() -> None:
    workers = Workers("the prompt", WAIT_S, 1)
    made: list[str] = []

    async def crowd() -> None:
        gate = threading.Event()
        first = asyncio.create_task(workers.run("greedy", gate.wait, WAIT_S))
        await asyncio.sleep(0)
        tasks = [asyncio.create_task(workers.run("greedy", made.append, f"greedy {n}")) for n in range(20)]
        tasks.append(asyncio.create_task(workers.run("modest", made.append, "modest")))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *tasks)

    asyncio.run(crowd())
    workers.close()
    assert made.index("modest") <= 1


def test_a_flood_of_prompts_leaves_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from dormouse.models import workers as module

    monkeypatch.setattr(module, "_ROOM", 4)
    workers = Workers("the prompt", WAIT_S, 1)

    async def crowd() -> None:
        gate = threading.Event()
        held = [asyncio.create_task(workers.run("greedy", gate.wait, WAIT_S)) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await workers.run("greedy", gate.wait, WAIT_S)
        modest = asyncio.create_task(workers.run("modest", lambda: "served"))
        await asyncio.sleep(0)
        gate.set()
        assert await modest == "served"
        await asyncio.gather(*held)

    asyncio.run(crowd())
    workers.close()


def test_threads_that_come_back_are_used_again() -> None:
    workers = Workers("the prompt", NO_TIME_S, 1)

    async def crowd() -> None:
        gates = [threading.Event() for _ in range(3)]
        for gate in gates:
            with pytest.raises(PromptStalled) as caught:
                await workers.run("a", gate.wait, WAIT_S)
            assert caught.value.has_begun
        with pytest.raises(PromptStalled) as caught:
            await workers.run("a", divmod, 7, 2)
        assert not caught.value.has_begun
        assert workers.num_stuck == 3
        for gate in gates:
            gate.set()
        while workers.num_stuck:
            await asyncio.sleep(0)
        assert await workers.run("a", divmod, 7, 2) == (3, 1)

    asyncio.run(crowd())
    workers.close()


def test_an_error_of_the_calls_own_is_not_taken_for_a_deadline() -> None:
    workers = Workers("the prompt", WAIT_S, 1)

    def late() -> None:
        raise TimeoutError("of its own")

    def panic() -> None:
        raise BaseException("index out of bounds")

    with pytest.raises(TimeoutError, match="of its own"):
        asyncio.run(workers.run("a", late))
    with pytest.raises(RuntimeError, match="index out of bounds"):
        asyncio.run(workers.run("a", panic))
    workers.close()
