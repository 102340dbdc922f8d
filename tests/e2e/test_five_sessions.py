"""Five coding sessions at once: alike in system prompt and tools, of their own in everything else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest
from benchmarks.server import Server
from tests.live import REMINDER, CodingSession, at_once, strict_server

pytestmark = [pytest.mark.usefixtures("smollm2"), pytest.mark.timeout(600)]

WORDS = ("marigold", "tungsten", "archipelago", "bassoon", "quicksilver")
QUESTIONS = ("What is in the file {word}.txt? Say it in your own words.", "And what would you change there?")
FLAGS = ("--arena-tokens", "24576")


def session(word: str) -> CodingSession:
    return CodingSession(f"{WORDS.index(word):03x}0-{word}", word)


def converse(talk: CodingSession, url: str) -> CodingSession:
    for question in QUESTIONS:
        talk.say(url, question.format(word=talk.canary))
    return talk


@dataclass
class Fleet:
    """The server after five sessions of two turns each."""

    server: Server
    http: httpx.Client
    sessions: list[CodingSession]

    def counted(self, body: dict[str, object]) -> int:
        """Tokens of a prompt."""
        answer = self.http.post("/v1/messages/count_tokens", json=body).raise_for_status()
        return int(answer.json()["input_tokens"])

    @property
    def shared_tokens(self) -> int:
        """Tokens of the prompt before the first word of a session: system prompt and tools."""
        body = session("marigold").body(1)
        without = body | {"messages": [{"role": "user", "content": "What is in the file "}]}
        return self.counted(without)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    with strict_server(folder / "data", *FLAGS) as server, server.client() as http:
        sessions = [session(word) for word in WORDS]
        at_once([partial(converse, talk, server.url) for talk in sessions])
        yield Fleet(server, http, sessions)


def test_five_concurrent_sessions(fleet: Fleet) -> None:
    """S17: five at once; every stream is whole, in order, and ended for a reason."""
    first = [talk.turns[0] for talk in fleet.sessions]
    assert max(turn.began for turn in first) < min(turn.first_text for turn in first), "they did overlap"
    for turn in (turn for talk in fleet.sessions for turn in talk.turns):
        assert turn.kinds == [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert turn.stop_reason in ("end_turn", "max_tokens")


def test_agents_have_independent_caches(fleet: Fleet) -> None:
    """S18: one agent for each session, and a second turn finds all of its own first one."""
    listed = {agent["id"]: agent for agent in fleet.http.get("/v1/agents").json()["data"]}
    assert {talk.agent for talk in fleet.sessions} <= listed.keys()
    for talk in fleet.sessions:
        first, second = talk.turns
        # The last sampled token is computed when the next turn comes.
        assert second.cached_tokens >= first.prompt_tokens + first.usage["output_tokens"] - 2
        assert second.cached_tokens > fleet.shared_tokens
        assert listed[talk.agent]["tokens"] >= second.prompt_tokens + second.usage["output_tokens"] - 1


def test_no_word_of_another_agent_appears(fleet: Fleet) -> None:
    """S19: nobody says, or was sent, what only another was told."""
    for talk in fleet.sessions:
        said = " ".join(turn.text for turn in talk.turns).lower()
        assert not [word for word in WORDS if word != talk.canary and word in said]


def test_nothing_matches_beyond_what_is_shared(fleet: Fleet) -> None:
    """S19: a stranger finds the system prompt and the tools, and not one token of a session more; and whoever
    knows a session's words but not its beginning finds none of it."""
    stranger = CodingSession("fff0-stranger", "obsidian")
    turn = stranger.say(fleet.server.url, QUESTIONS[0].format(word="obsidian"), max_tokens=2)
    shared = fleet.shared_tokens
    assert shared - 40 < turn.cached_tokens <= shared
    spy = {
        "model": "claude-sonnet-4-5",
        "max_tokens": 1,
        "system": "You are somebody else.",
        "messages": [{"role": "user", "content": f"{QUESTIONS[0].format(word='bassoon')} {REMINDER}"}],
    }
    usage = fleet.http.post("/v1/messages", json=spy).json()["usage"]
    assert usage["cache_read_input_tokens"] < 10, "only the template's own first tokens"


def test_all_agents_generate_correctly(fleet: Fleet, tmp_path: Path) -> None:
    """S20: word for word what each session hears from a server that it has to itself."""
    with strict_server(tmp_path / "data", *FLAGS) as server:
        for talk in fleet.sessions[:3]:
            alone = converse(session(talk.canary), server.url)
            assert [turn.text for turn in alone.turns] == [turn.text for turn in talk.turns]
            assert all(turn.text.strip() for turn in alone.turns)
