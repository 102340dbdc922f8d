"""Claude Code, as it comes from npm."""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from benchmarks.server import Server
from tests.clients.conftest import MODEL, Run, installed
from tests.clients.recorder import Exchange, Recorder
from tests.docs.clients_page import variables

pytestmark = [pytest.mark.clients, pytest.mark.timeout(3600)]

PATH = "/v1/messages"
SMALL = ("--tools", "", "--system-prompt")


@pytest.fixture
def claude(run: Run, recorder: Recorder) -> Run:
    """Runs `claude -p` as docs/clients.md says; returns what it printed."""
    program = installed("node_modules/.bin/claude")

    def claude(*arguments: str) -> str:
        settings = variables("Claude Code", recorder.url)
        # One sentence is enough here.
        settings["CLAUDE_CODE_EXTRA_BODY"] = '{"temperature": 0, "max_tokens": 400, "stop_sequences": ["."]}'
        return run(program, "-p", *arguments, "--output-format", "json", **settings)

    return claude


def test_the_first_request_runs_in_full_and_the_second_turn_is_cached(
    claude: Run, recorder: Recorder, server: Server
) -> None:
    said = json.loads(claude("Say hello."))
    assert said["subtype"] == "success"
    first = recorder.posts(PATH)[-1]
    assert_as_we_test_it(first)
    assert_whole(first)
    assert said["result"].strip() == text_of(first).strip()
    used = usage_of(first)
    assert prompt_tokens(used) > 15_000
    assert said["modelUsage"][MODEL]["outputTokens"] == used["output_tokens"] > 0

    # What it sent, counted: exactly what was used.
    counted = {key: first.sent[key] for key in ("model", "messages", "system", "tools", "thinking")}
    with server.client() as client:
        answer = client.post(f"{PATH}/count_tokens?beta=true", json=counted)
    assert answer.json() == {"input_tokens": prompt_tokens(used)}

    recorder.forget()
    again = json.loads(claude("And goodbye.", "--continue"))
    assert again["subtype"] == "success"
    second = recorder.posts(PATH)[-1]
    assert_whole(second)
    missed = prompt_tokens(usage_of(second)) - usage_of(second)["cache_read_input_tokens"]
    assert missed < 64, "the new turn alone is computed"
    with server.client() as client:
        agents = [agent["id"] for agent in client.get("/v1/agents").json()["data"]]
    assert f"claude-code/{said['session_id']}" in agents


def test_five_sessions_at_once_keep_apart(claude: Run, recorder: Recorder) -> None:
    sessions = {str(uuid.uuid4()): f"You are guard number {n}; your word is {n * 1111}." for n in range(1, 6)}

    def ask(session: str, *more: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(claude("Who are you?", *more, *SMALL, sessions[session]))
        return answer

    with ThreadPoolExecutor(len(sessions)) as threads:
        firsts = dict(zip(sessions, threads.map(lambda s: ask(s, "--session-id", s), sessions), strict=True))
        asked = {one.headers["x-claude-code-session-id"]: one for one in recorder.posts(PATH)}
        recorder.forget()
        seconds = dict(zip(sessions, threads.map(lambda s: ask(s, "--resume", s), sessions), strict=True))
        resumed = {one.headers["x-claude-code-session-id"]: one for one in recorder.posts(PATH)}
    assert asked.keys() == resumed.keys() == sessions.keys()
    for session, prompt in sessions.items():
        first, second = asked[session], resumed[session]
        assert prompt in first.body.decode()
        for exchange, answer in ((first, firsts[session]), (second, seconds[session])):
            assert_whole(exchange)
            assert answer["result"].strip() == text_of(exchange).strip()
        # Found again is all of this session's first turn, and so nothing of another's.
        before = usage_of(first)
        known = prompt_tokens(before) + before["output_tokens"]
        assert usage_of(second)["cache_read_input_tokens"] >= known - 1


def assert_as_we_test_it(exchange: Exchange) -> None:
    """What tests/api/test_anthropic.py takes for a request of this client is one still."""
    sent = exchange.sent
    assert exchange.headers["x-claude-code-session-id"] in sent["metadata"]["user_id"]
    assert sent["system"][0]["text"].startswith("x-anthropic-billing-header: cc_version=")
    assert [turn["role"] for turn in sent["messages"]] == ["user", "system"]
    assert all({"name", "description", "input_schema"} == tool.keys() for tool in sent["tools"])
    assert sent["thinking"] == {"type": "adaptive"}
    assert sent["context_management"]["edits"] == [{"type": "clear_thinking_20251015", "keep": "all"}]
    assert sent["output_config"].keys() == {"effort"}
    assert sent["stream"] is True


def assert_whole(exchange: Exchange) -> None:
    assert exchange.status == 200
    assert exchange.is_complete, "the client hung up"
    kinds = [event["type"] for event in exchange.events()]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]


def usage_of(exchange: Exchange) -> dict[str, Any]:
    return dict(exchange.event("message_delta")["usage"])


def prompt_tokens(usage: dict[str, Any]) -> int:
    return sum(
        usage[name] for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    )


def text_of(exchange: Exchange) -> str:
    deltas = [event["delta"] for event in exchange.events() if event["type"] == "content_block_delta"]
    return "".join(delta["text"] for delta in deltas if delta["type"] == "text_delta")
