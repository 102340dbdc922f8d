"""Codex, as it comes from npm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.server import Server
from tests.clients.conftest import Run, installed
from tests.clients.recorder import Exchange, Recorder
from tests.docs.clients_page import blocks, variables

pytestmark = [pytest.mark.clients, pytest.mark.timeout(3600)]

PATH = "/v1/responses"


@pytest.fixture
def codex(run: Run, recorder: Recorder, home: Path) -> Run:
    """Runs `codex exec` as docs/clients.md says; returns what it printed."""
    program = installed("node_modules/.bin/codex")
    (home / ".codex").mkdir()
    (config,) = blocks("Codex", "toml", recorder.url)
    (home / ".codex" / "config.toml").write_text(config)

    def codex(*arguments: str) -> str:
        settings = variables("Codex", recorder.url)
        return run(program, "exec", "--skip-git-repo-check", "--json", *arguments, **settings)

    return codex


def test_the_first_request_runs_in_full_and_the_second_turn_is_cached(
    codex: Run, recorder: Recorder, server: Server
) -> None:
    events = parsed(codex("Say hello."))
    (first,) = recorder.posts(PATH)
    assert_as_we_test_it(first)
    response = completed(first)
    assert answers(events) == [text_of(response)]
    used = response["usage"]
    assert used["input_tokens"] > 5_000
    told = events[-1]["usage"]
    assert (told["input_tokens"], told["output_tokens"]) == (used["input_tokens"], used["output_tokens"])

    recorder.forget()
    events = parsed(codex("resume", "--last", "And goodbye."))
    (second,) = recorder.posts(PATH)
    response = completed(second)
    assert answers(events) == [text_of(response)]
    missed = response["usage"]["input_tokens"] - response["usage"]["input_tokens_details"]["cached_tokens"]
    assert missed < 64, "the new turn alone is computed"
    with server.client() as client:
        agents = [agent["id"] for agent in client.get("/v1/agents").json()["data"]]
    assert f"codex/{first.headers['thread-id']}" in agents


def assert_as_we_test_it(exchange: Exchange) -> None:
    """What tests/api/test_responses.py takes for a request of this client is one still."""
    sent = exchange.sent
    assert "content-encoding" not in exchange.headers, "what is compressed, nobody here unpacks"
    assert exchange.headers["thread-id"] == sent["prompt_cache_key"] == sent["client_metadata"]["thread_id"]
    assert (sent["stream"], sent["store"], sent["tool_choice"]) == (True, False, "auto")
    assert {tool["type"] for tool in sent["tools"]} == {"function", "namespace", "web_search"}
    assert [item["role"] for item in sent["input"]] == ["developer", "developer", "user", "user"]


def completed(exchange: Exchange) -> dict[str, Any]:
    assert (exchange.status, exchange.is_complete) == (200, True)
    events = exchange.events()
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "response.completed"
    return dict(events[-1]["response"])


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def parsed(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


def answers(events: list[dict[str, Any]]) -> list[str]:
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    return [item["text"] for item in items if item["type"] == "agent_message"]
