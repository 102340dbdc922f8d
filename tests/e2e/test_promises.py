"""The four promises, each by its name, with the real model and real processes."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import openai
import pytest
from benchmarks.conversation import Conversation
from benchmarks.server import Server, serve

from dormouse.models.folder import ModelFolder

pytestmark = [pytest.mark.usefixtures("smollm2"), pytest.mark.timeout(600)]

TEXT = " ".join(
    f"In year {year} the harvest of the valley was {year % 37} carts." for year in range(1700, 1760)
)
TURNS = (f"{TEXT}\nHow many carts came in 1712?", "And in 1713?", "Thank you. Say goodbye in a rhyme.")
SMALL_ARENA = ("--arena-tokens", "4096")
REPLY = 24


def talk(server: Server, conversation: Conversation, *turns: str) -> list[str]:
    with server.client() as client:
        return [conversation.say(client, turn, max_tokens=REPLY).text for turn in turns]


@pytest.fixture(scope="module")
def never_slept(tmp_path_factory: pytest.TempPathFactory, smollm2: ModelFolder) -> list[str]:
    """The replies of a server that nothing ever happened to."""
    assert smollm2.path
    with serve(tmp_path_factory.mktemp("data")) as server:
        return talk(server, Conversation("a"), *TURNS)


def evict(server: Server) -> None:
    """Push agent a out of a small arena by the contexts of others."""
    with server.client() as client:
        for name in "bcdefghi":
            Conversation(name).say(client, f"{name} {TEXT}", max_tokens=1)
        # Its first block may stay: the others share the head of it, the system prompt.
        assert client.get("/v1/agents/a").json()["state"] != "awake"


@pytest.mark.parametrize(
    ("end", "durable"), [(signal.SIGTERM, False), (signal.SIGKILL, True), (signal.SIGKILL, False)]
)
def test_sleep_is_invisible(
    tmp_path: Path, never_slept: list[str], end: signal.Signals, durable: bool
) -> None:
    """A restart, a SIGKILL, and a SIGKILL that left the last blocks unwritten: the same words."""
    conversation = Conversation("a")
    with serve(tmp_path) as server:
        replies = talk(server, conversation, *TURNS[:2])
        if durable:
            with server.client() as client:
                conversation.wait_until_durable(client)
        server.process.send_signal(end)
        assert server.process.wait(60) == (0 if end == signal.SIGTERM else -signal.SIGKILL)
    with serve(tmp_path) as server:
        replies += talk(server, conversation, TURNS[2])
    assert replies == never_slept


def test_sleep_is_invisible_when_evicted(tmp_path: Path, never_slept: list[str]) -> None:
    conversation = Conversation("a")
    with serve(tmp_path, *SMALL_ARENA) as server:
        replies = talk(server, conversation, *TURNS[:2])
        evict(server)
        replies += talk(server, conversation, TURNS[2])
        with server.client() as client:
            assert client.get("/health").json()["engine"]["disk_tokens"] > 500
    assert replies == never_slept


@pytest.mark.parametrize("loss", ["all blocks", "every second block", "the catalog"])
def test_nothing_is_lost(tmp_path: Path, never_slept: list[str], loss: str) -> None:
    """Damage costs time, never a word; history outlives the blocks."""
    conversation = Conversation("a")
    with serve(tmp_path) as server:
        replies = talk(server, conversation, *TURNS[:2])
        assert server.stop() == 0
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) > 8
    if loss == "the catalog":
        for file in tmp_path.glob("catalog.sqlite*"):
            file.unlink()
    else:
        for file in files[:: 1 if loss == "all blocks" else 2]:
            file.write_bytes(file.read_bytes()[:-1000])
    with serve(tmp_path) as server:
        with server.client() as client:
            known = [agent["id"] for agent in client.get("/v1/agents").json()["data"]]
        assert known == ([] if loss == "the catalog" else ["a"])
        replies += talk(server, conversation, TURNS[2])
    assert replies == never_slept


def test_waking_costs_a_read(tmp_path: Path) -> None:
    """After a restart, and after each sleep, the same prompt computes one token, whose logits are wanted."""
    with serve(tmp_path) as server, server.client() as client:
        before = Conversation("a").say(client, TURNS[0], max_tokens=REPLY)
        assert server.stop() == 0
    wakes = []
    with serve(tmp_path) as server, server.client() as client:
        for _ in range(3):
            wakes.append(Conversation("a").say(client, TURNS[0], max_tokens=REPLY))
            assert client.post("/v1/agents/a/sleep").json()["state"] == "asleep"
    assert {after.text for after in wakes} == {before.text}
    assert {after.prompt_tokens - after.cached_tokens for after in wakes} == {1}
    # The best of three: others may use the machine.
    assert min(after.ttft_ms for after in wakes) < before.ttft_ms


def test_openai_sdk_works(tmp_path: Path) -> None:
    # The full weights: what a model this small knows of France does not outlive rounding them.
    server_of = serve(tmp_path, "--weights", "bf16")
    with server_of as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        question: Any = [{"role": "user", "content": "What is the capital of France?"}]
        reply = client.chat.completions.create(model="smollm2", messages=question, temperature=0)
        assert "Paris" in (reply.choices[0].message.content or "")
        with client.chat.completions.create(
            model="smollm2", messages=question, temperature=0, stream=True
        ) as stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == reply.choices[0].message.content


def test_a_data_folder_has_one_server(tmp_path: Path) -> None:
    second = serve(tmp_path)
    with serve(tmp_path), pytest.raises(RuntimeError, match="process"):
        second.__enter__()
