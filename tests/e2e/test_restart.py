"""A data folder outlives its server; what another configuration stored is left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from benchmarks.conversation import Conversation, Turn
from benchmarks.server import Server
from benchmarks.twin import make_twin
from tests.live import block_files, block_metadata, strict_server

from dormouse.models.folder import ModelFolder

pytestmark = pytest.mark.timeout(600)

NAMES = ("ada", "bob", "eve")
REPLY = 12
RESUME_MS = 500.0
FLAGS = ("--arena-tokens", "8192")


def context(name: str) -> str:
    """Some 700 tokens, another text for each agent from its first word on."""
    lines = (f"{name} saw {(year * len(name)) % 41} carts in the year {year}." for year in range(1700, 1744))
    return f"{' '.join(lines)} How many carts came in 1712?"


@dataclass
class Past:
    """What a first server did before it was stopped: its agents' replies, and its data folder."""

    data: Path
    models: tuple[str, ...]
    conversations: dict[str, Conversation]
    first: dict[str, Turn]

    def resume(self, server: Server, name: str) -> Turn:
        """The agent's first turn again, as a client does that has not got the answer."""
        again = Conversation(name)
        with server.client() as client:
            return again.say(client, context(name), max_tokens=REPLY)


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory, smollm2: ModelFolder) -> Past:
    folder = tmp_path_factory.mktemp("restart")
    make_twin(smollm2, folder / "models" / "twin")
    (folder / "models" / smollm2.name).symlink_to(smollm2.path)
    models = ("--models-dir", str(folder / "models"))
    conversations = {name: Conversation(name) for name in NAMES}
    with strict_server(folder / "data", *FLAGS, *models) as server, server.client() as client:
        first = {
            name: talk.say(client, context(name), max_tokens=REPLY) for name, talk in conversations.items()
        }
    return Past(folder / "data", models, conversations, first)


def test_agents_persist_and_resume(past: Past, record_property: Callable[[str, Any], None]) -> None:
    """S9, S10, S11: known after a restart, in the same words, from disk, the first token within 500 ms, or
    within a fifth of what it took cold where the machine is slow."""
    with strict_server(past.data, *FLAGS, *past.models) as server, server.client() as client:
        listed = {agent["id"]: agent for agent in client.get("/v1/agents").json()["data"]}
        assert set(listed) >= set(NAMES)
        assert {listed[name]["state"] for name in NAMES} == {"asleep"}
        times = []
        for name in NAMES:
            turn = past.resume(server, name)
            assert turn.text == past.first[name].text
            assert turn.prompt_tokens - turn.cached_tokens == 1, "one token, whose logits are wanted"
            times.append(turn.ttft_ms)
        disk_tokens = client.get("/health").json()["engine"]["disk_tokens"]
        assert disk_tokens > sum(turn.prompt_tokens for turn in past.first.values()) - 3 * 40
        follow_up = past.conversations["ada"].say(client, "And in 1713?", max_tokens=REPLY)
        assert follow_up.cached_tokens > past.first["ada"].prompt_tokens
    cold = min(turn.ttft_ms for turn in past.first.values())
    record_property("resume_ms", [round(ms, 1) for ms in times])
    record_property("cold_ms", round(cold, 1))
    # The best of three: others may use the machine.
    assert min(times) < max(RESUME_MS, cold / 5)
    assert min(times) < cold


@pytest.mark.parametrize(
    "flags",
    [("--kv-format", "q8"), ("--block-size", "64"), ("--model", "twin")],
    ids=["another KV format", "another block size", "another model"],
)
def test_incompatible_caches_are_not_used(past: Past, flags: tuple[str, str]) -> None:
    """S12: neither reuse nor error; both kinds of blocks lie side by side, and the first agent stays."""
    before = {block_metadata(file)["namespace"] for file in block_files(past.data)}
    files = set(block_files(past.data))
    with strict_server(past.data, *FLAGS, *past.models, *flags) as server, server.client() as client:
        body = {
            "model": "default",
            "messages": [{"role": "user", "content": context("ada")}],
            "temperature": 0,
            "max_tokens": 2,
        }
        answer = client.post("/v1/chat/completions", json=body, headers={"x-agent-id": "ada"})
        assert answer.status_code == 200
        found = answer.json()["usage"]["prompt_tokens_details"]
        assert (found["cached_tokens"], found["disk_tokens"]) == (0, 0)
        health = client.get("/health").json()
        assert (health["status"], health["reasons"]) == ("ok", [])
    assert files <= set(block_files(past.data)), "nothing of the other configuration was removed"
    after = {block_metadata(file)["namespace"] for file in block_files(past.data)}
    assert len(after) == len(before) + 1
