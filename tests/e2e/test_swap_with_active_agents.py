"""A swap in the middle of replies: nobody is dropped, nobody is answered by the wrong model, and a model
that cannot be loaded leaves the old one serving."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.conversation import Conversation
from benchmarks.server import Server
from benchmarks.suite.streams import Prompt, Stream, connect, read, read_all
from benchmarks.twin import make_twin
from tests.live import COMPLAINTS, strict_server

from dormouse.models.folder import ModelFolder

pytestmark = pytest.mark.timeout(600)

NAMES = ("ada", "bob", "eve")
QUESTION = "Tell a long story about {name}, a dormouse, and a lighthouse."
REPLY = 96
LONG_REPLY = 256
WAIT_S = 300.0
SWAP_S = 180.0
"""4 s on a quiet machine, the replies' ends included; the 30 s that are asked for are a quiet one's."""


@dataclass
class Live:
    """The server, a client, and the folder of its models."""

    server: Server
    http: httpx.Client
    models: Path


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, smollm2: ModelFolder) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("swap")
    make_twin(smollm2, folder / "models" / "twin")
    (folder / "models" / smollm2.name).symlink_to(smollm2.path)
    flags = ("--models-dir", str(folder / "models"), "--arena-tokens", "8192")
    # One swap is made to fail, and the log says so.
    complaints = tuple(word for word in COMPLAINTS if word not in ("ERROR", "Traceback"))
    with strict_server(folder / "data", *flags, complaints=complaints) as server, server.client() as http:
        yield Live(server, http, folder / "models")


def tell(server: Server, name: str) -> str:
    with server.client() as client:
        return Conversation(name).say(client, QUESTION.format(name=name), max_tokens=REPLY).text


def swap(live: Live, model: str) -> dict[str, Any]:
    answer = live.http.post("/admin/models/swap", json={"model": model, "timeout_s": WAIT_S})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


async def swap_beside(url: str, prompts: Sequence[Prompt], model: str) -> tuple[list[Stream], dict[str, Any]]:
    """All of these at once, and a swap that is asked for when each of them has begun to answer."""
    async with connect(url) as http, asyncio.timeout(WAIT_S):
        started = [asyncio.Event() for _ in prompts]
        running = [
            asyncio.create_task(read(http, prompt, begun))
            for prompt, begun in zip(prompts, started, strict=True)
        ]
        for begun in started:
            await begun.wait()
        asked_at = time.monotonic()
        answer = await http.post("/admin/models/swap", json={"model": model, "timeout_s": WAIT_S})
        streams = await asyncio.gather(*running)
    assert answer.status_code == 200, answer.text
    assert min(stream.times[-1] for stream in streams) > asked_at, "one had ended before the swap"
    return streams, answer.json()


def test_active_agents_drain(live: Live, record_property: Callable[[str, Any], None]) -> None:
    """S13, S14, S15, S45: a swap while three agents speak has an end in time, all three finish with the
    words that they would have said, and the new model answers."""
    prompts = [Prompt(name, QUESTION.format(name=name), LONG_REPLY) for name in NAMES]
    undisturbed = asyncio.run(read_all(live.server.url, prompts))
    swap(live, "twin")
    swap(live, "smollm2")
    disturbed, change = asyncio.run(swap_beside(live.server.url, prompts, "twin"))
    record_property("swap_s", change["seconds"])
    assert change["seconds"] < SWAP_S
    assert change["cut_requests"] == 0
    assert [stream.text for stream in disturbed] == [stream.text for stream in undisturbed]
    assert live.http.get("/health").json()["model"] == "twin"
    body = {"model": "default", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 4}
    assert live.http.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] > 0
    swap(live, "smollm2")


def test_requests_go_on_during_a_swap(live: Live) -> None:
    """S14: a client that asks all the time hears nothing but answers."""
    body = {"model": "default", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 1}
    done = threading.Event()
    statuses: list[int] = []

    def ask() -> None:
        with live.server.client() as client:
            while not done.is_set():
                statuses.append(client.post("/v1/chat/completions", json=body).status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for model in ("twin", "smollm2"):
            swap(live, model)
    finally:
        done.set()
        asking.join(60)
    assert statuses
    assert set(statuses) == {200}


def test_a_failed_swap_is_rolled_back(live: Live, smollm2: ModelFolder) -> None:
    """S16: weights that turn out to be unusable only while they are loaded: the answer says why, and the old
    model serves on with its agents."""
    before = tell(live.server, "ada")
    broken = live.models / "broken"
    broken.mkdir()
    for name in smollm2.files:
        if name.endswith(".safetensors"):
            (broken / name).write_bytes(mistyped((smollm2.path / name).read_bytes()))
        else:
            (broken / name).symlink_to((smollm2.path / name).resolve())
    answer = live.http.post("/admin/models/swap", json={"model": "broken"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (500, "swap_failed"), error
    assert "int16" in error["message"]
    health = live.http.get("/health").json()
    assert (health["status"], health["model"], health["ready"]) == ("ok", "smollm2", True)
    again = Conversation("ada")
    turn = again.say(live.http, QUESTION.format(name="ada"), max_tokens=REPLY)
    assert turn.text == before
    assert turn.cached_tokens == turn.prompt_tokens - 1, "its agents are there"


def mistyped(weights: bytes) -> bytes:
    """A weights file of the same names and shapes, whose first tensor claims to hold integers."""
    assert weights.count(b'"dtype":"BF16"') > 100
    return weights.replace(b'"dtype":"BF16"', b'"dtype": "I16"', 1)
