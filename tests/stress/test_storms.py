"""Swaps, forks and deletions by the dozen, while others talk: these hear nothing of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.conversation import Conversation
from benchmarks.figures import Scale
from benchmarks.flood import Client, Visit, visit_all
from benchmarks.server import Server
from benchmarks.twin import make_twin
from tests.fake_server import PAGE, fake_server
from tests.live import WAIT_S, at_once, strict_server
from tests.stress.watch import assert_store_is_whole, idle, state, written

from dormouse.models.folder import ModelFolder

pytestmark = pytest.mark.timeout(600)

TALKERS = 6
REPLY = 40


def talkers(name: str) -> list[Client]:
    """Who talks beside a storm, each of something else."""
    return [Client.asking(f"{name}-{i}", f"{name} {i} " * 10, REPLY) for i in range(TALKERS)]


@contextmanager
def talking(server: Server, clients: list[Client]) -> Iterator[list[list[Visit]]]:
    """All of `clients` ask again and again, until the block ends; the rounds of visits are there after it."""
    done = threading.Event()
    rounds: list[list[Visit]] = []

    def talk() -> None:
        while not done.is_set():
            rounds.append(asyncio.run(visit_all(server.url, clients, len(clients))))

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(talk)
        try:
            yield rounds
        finally:
            done.set()
        running.result(WAIT_S)


def texts(visits: list[Visit]) -> list[str]:
    assert all(seen.is_whole for seen in visits)
    return [seen.text for seen in visits]


def swap(http: httpx.Client, model: str) -> dict[str, Any]:
    answer = http.post("/admin/models/swap", json={"model": model, "timeout_s": 60})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def test_a_storm_of_swaps(tmp_path: Path, scale: Scale, figures: dict[str, Any]) -> None:
    """S28: models come and go under agents that talk: no error, no other word, nobody is cut."""
    clients = talkers("swapped")
    num_swaps = scale(20, 300)
    with fake_server(tmp_path / "data", "--pages", "256") as server, server.client() as http:
        expected = texts(asyncio.run(visit_all(server.url, clients, 1)))
        with talking(server, clients) as rounds:
            changes = [swap(http, "ba"[number % 2]) for number in range(num_swaps)]
        idle(http)
        host = state(http)["host"]
    assert [change["cut_requests"] for change in changes] == [0] * num_swaps
    assert host["swaps"]["done"] == num_swaps
    assert all(texts(visits) == expected for visits in rounds)
    assert_store_is_whole(tmp_path / "data")
    figures |= {
        "swaps": num_swaps,
        "rounds_of_replies": len(rounds),
        "longest_swap_s": max(change["seconds"] for change in changes),
    }


def test_a_storm_of_swaps_on_the_real_model(
    tmp_path: Path, smollm2: ModelFolder, scale: Scale, figures: dict[str, Any]
) -> None:
    """S28: with real weights: a reply is that of the one model or of the other, from its first word to its
    last."""
    models = tmp_path / "models"
    make_twin(smollm2, models / "twin")
    (models / smollm2.name).symlink_to(smollm2.path)
    names = ("twin", smollm2.name)
    clients = talkers("swapped")
    flags = ("--models-dir", str(models), "--model", smollm2.name, "--arena-tokens", "4096")
    num_swaps = scale(2, 20)
    with strict_server(tmp_path / "data", *flags) as server, server.client() as http:
        of_model = [texts(asyncio.run(visit_all(server.url, clients, TALKERS)))]
        swap(http, "twin")
        of_model.append(texts(asyncio.run(visit_all(server.url, clients, TALKERS))))
        swap(http, smollm2.name)
        with talking(server, clients) as rounds:
            changes = [swap(http, names[number % 2]) for number in range(num_swaps)]
        idle(http)
    assert of_model[0] != of_model[1]
    replies = [texts(visits) for visits in rounds]
    for said in replies:
        assert all(text in both for text, both in zip(said, zip(*of_model, strict=True), strict=True))
    assert [change["cut_requests"] for change in changes] == [0] * num_swaps
    assert_store_is_whole(tmp_path / "data")
    figures |= {
        "swaps": num_swaps,
        "rounds_of_replies": len(rounds),
        "swap_s": sorted(change["seconds"] for change in changes),
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("storms") / "data"
    with fake_server(data, "--pages", "512", "--max-running", "32") as server:
        yield server
    assert_store_is_whole(data)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def at_a_time(calls: Sequence[Callable[[], httpx.Response]], most: int = 50) -> list[httpx.Response]:
    """All answers, so many calls at once."""
    return [answer for start in range(0, len(calls), most) for answer in at_once(calls[start : start + most])]


def test_a_storm_of_forks(server: Server, http: httpx.Client, scale: Scale, figures: dict[str, Any]) -> None:
    """S28: many forks of one agent at once write nothing, find all of its past, and say what it would say."""
    source = Conversation("source")
    source.say(http, "remember this " * 20, max_tokens=REPLY)
    before = written(http)
    names = [f"fork-{i}" for i in range(scale(50, 400))]
    clients = talkers("beside-forks")
    expected = texts(asyncio.run(visit_all(server.url, clients, 1)))
    with talking(server, clients) as rounds:
        forks = at_a_time(
            [partial(http.post, "/v1/agents/source/fork", json={"name": name}) for name in names]
        )
    assert {fork.status_code for fork in forks} == {201}
    assert all(texts(visits) == expected for visits in rounds)
    assert written(http)["num_agents"] == before["num_agents"] + len(names) + TALKERS
    past = [dict(message) for message in source.messages]
    next_turn = source.say(http, "and now?", max_tokens=REPLY)
    said = asyncio.run(_go_on(server.url, names, past, "and now?"))
    assert set(texts(said)) == {next_turn.text}
    sizes = {http.get(f"/v1/agents/{name}").json()["tokens"] for name in names}
    assert len(sizes) == 1
    figures |= {"forks": len(names), "rounds_of_replies_beside": len(rounds)}


async def _go_on(url: str, names: list[str], past: list[dict[str, str]], text: str) -> list[Visit]:
    messages = (*past, {"role": "user", "content": text})
    return await visit_all(url, [Client(name, messages, REPLY) for name in names], 50)


def test_a_storm_of_deletions(
    server: Server, http: httpx.Client, scale: Scale, figures: dict[str, Any]
) -> None:
    """S28: many agents deleted at once are gone with all their blocks, and nobody else loses any."""
    doomed = [Client.asking(f"doomed-{i}", f"doomed {i} " * 12, REPLY) for i in range(scale(50, 400))]
    beside = talkers("beside-deletions")
    expected = texts(asyncio.run(visit_all(server.url, beside, 1)))
    blocks = written(http)["num_blocks"]
    asyncio.run(visit_all(server.url, doomed, 50))
    assert written(http)["num_blocks"] > blocks + len(doomed)
    calls = [partial(http.delete, f"/v1/agents/{client.agent}") for client in doomed]
    with talking(server, beside) as rounds:
        deleted = at_a_time(calls)
        again = at_a_time(calls)
    assert {answer.status_code for answer in deleted} == {200}
    assert {answer.status_code for answer in again} == {404}
    assert all(texts(visits) == expected for visits in rounds)
    idle(http)
    assert written(http)["num_blocks"] == blocks
    assert http.get("/v1/agents", params={"prefix": "doomed-"}).json()["data"] == []
    found = http.post("/v1/chat/completions", json={**doomed[0].body, "stream": False}).json()["usage"]
    assert found["prompt_tokens_details"]["cached_tokens"] < PAGE, "the words are found by nobody"
    figures |= {"deletions": len(doomed), "rounds_of_replies_beside": len(rounds)}
