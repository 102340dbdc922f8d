"""Forks and moved agents with the real model: both go on with the words of one that nothing happened to."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from benchmarks.conversation import Conversation, Turn
from benchmarks.server import Server, serve

from dormouse.models.folder import ModelFolder

pytestmark = [pytest.mark.usefixtures("smollm2"), pytest.mark.timeout(300)]

TEXT = " ".join(
    f"In year {year} the harvest of the valley was {year % 37} carts." for year in range(1700, 1730)
)
FIRST = f"{TEXT}\nHow many carts came in 1712?"
BRANCHES = ("And in 1713? Tell me more about it.", "Say goodbye in a rhyme.")
REPLY = 24


def say(server: Server, conversation: Conversation, text: str) -> Turn:
    with server.client() as client:
        turn = conversation.say(client, text, max_tokens=REPLY)
        conversation.wait_until_durable(client)
    return turn


def as_agent(conversation: Conversation, name: str) -> Conversation:
    return Conversation(name, copy.deepcopy(conversation.messages))


def test_forks_and_moved_agents_say_what_an_undisturbed_one_says(
    tmp_path: Path, smollm2: ModelFolder
) -> None:
    assert smollm2.path
    expected = []
    for number, branch in enumerate(BRANCHES):
        with serve(tmp_path / f"undisturbed-{number}") as server:
            undisturbed = Conversation("a")
            expected.append([say(server, undisturbed, text).text for text in (FIRST, branch)])
    with serve(tmp_path / "here") as server:
        original = Conversation("a")
        first = say(server, original, FIRST)
        with server.client() as client:
            client.post("/v1/agents/a/fork", json={"name": "b"}).raise_for_status()
            file = client.get("/v1/agents/b/export").raise_for_status().content
            client.post("/v1/agents/a/sleep").raise_for_status()
        fork = as_agent(original, "b")
        turns = [say(server, original, BRANCHES[0]), say(server, fork, BRANCHES[1])]
        assert [[first.text, turn.text] for turn in turns] == expected
        with server.client() as client:
            assert client.get("/v1/agents/b").json()["forked_from"].startswith("a@")
            client.delete("/v1/agents/a").raise_for_status()
    with serve(tmp_path / "there") as server:
        with server.client() as client:
            taken = client.post("/v1/agents/import", params={"name": "c"}, content=file)
            assert taken.status_code == 201, taken.text
            known = taken.json()["tokens"]
            assert taken.json()["durable_tokens"] >= known - 1, "all but the last sampled token"
        moved = as_agent(fork, "c")
        del moved.messages[-2:]  # the fork's second turn: here it is still to come
        turn = say(server, moved, BRANCHES[1])
        assert turn.text == expected[1][1]
        assert turn.cached_tokens >= known - 1, "nothing that it knew is computed again"
