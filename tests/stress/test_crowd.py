"""A hundred and two hundred agents at once: each is answered, by its own words and in its turn, and the
server grows by nothing."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.figures import Scale
from benchmarks.flood import Client, Visit, percentiles, visit, visit_all
from benchmarks.server import Server
from tests.fake_server import fake_server
from tests.live import WAIT_S, at_once, strict_server
from tests.stress.watch import Holdings, Sampler, idle, settled

from dormouse.models.folder import ModelFolder

pytestmark = pytest.mark.timeout(600)

STEP = 8
"""Sequences in a step of the fake server."""
CHECKED = 5
"""Of so many clients one is asked alone before."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("crowd")
    flags = ("--pages", "160", "--max-running", str(STEP), "--max-queue", "400")
    with fake_server(folder / "data", *flags) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def canary(index: int) -> str:
    """A word that no other client says, and that is in no other's."""
    return f"canary{index:04}"


def crowd(count: int, max_tokens: int) -> list[Client]:
    text = 'What is this word: "{0}"? Answer with the word.'
    return [Client.asking(f"agent-{i}", text.format(canary(i)), max_tokens) for i in range(count)]


def alone(server: Server, clients: Sequence[Client]) -> list[str]:
    """What these say when nobody else asks. They are deleted afterwards: a reply in the crowd finds nothing
    of it, and computes all by itself."""
    visits = asyncio.run(visit_all(server.url, clients, 1))
    with server.client() as http:
        for client in clients:
            http.delete(f"/v1/agents/{client.agent}").raise_for_status()
    return [seen.text for seen in visits]


def assert_own_words(clients: Sequence[Client], visits: Sequence[Visit], expected: Sequence[str]) -> int:
    """Whole replies, the checked ones word for word, and no canary but one's own; how many have that."""
    assert all(seen.is_whole for seen in visits)
    assert [seen.text for seen in visits[::CHECKED]] == list(expected)
    words = [canary(index) for index in range(len(clients))]
    said = [[word for word in words if word in seen.text] for seen in visits]
    assert all(found in ([], [word]) for found, word in zip(said, words, strict=True)), "another's word"
    return sum(map(len, said))


def test_a_hundred_agents_on_the_real_model(
    tmp_path: Path, smollm2: ModelFolder, figures: dict[str, Any]
) -> None:
    """S24: 100 at once on an arena for a few of them."""
    flags = ("--model", str(smollm2.path), "--arena-tokens", "4096")
    clients = crowd(100, 16)
    with strict_server(tmp_path / "data", *flags) as server, server.client() as http:
        expected = alone(server, clients[::CHECKED])
        visits = asyncio.run(visit_all(server.url, clients, len(clients)))
        idle(http)
    num_said = assert_own_words(clients, visits, expected)
    assert num_said > 0, "no canary can be seen in any reply"
    figures |= {
        "agents": len(clients),
        "said_their_own_word": num_said,
        "first_token_s": percentiles([seen.first_token_s for seen in visits if seen.first_token_s]),
        "total_s": percentiles([seen.total_s for seen in visits if seen.total_s]),
    }


def test_two_hundred_agents_and_their_transcripts(
    server: Server, http: httpx.Client, figures: dict[str, Any]
) -> None:
    """S24: 200 at once, whose pasts the server keeps: each past has its own words, and no other's."""
    clients = crowd(200, 24)
    expected = alone(server, clients[::CHECKED])
    visits = asyncio.run(visit_all(server.url, clients, len(clients)))
    assert_own_words(clients, visits, expected)
    assert len({seen.text for seen in visits}) == len(clients), "the fake never says the same of two pasts"
    at_once([partial(_say, http, index) for index in range(len(clients))])
    words = [canary(index) for index in range(len(clients))]
    for index, word in enumerate(words):
        past = http.get(f"/v1/agents/kept-{index}/messages").raise_for_status().json()["data"]
        assert [message["role"] for message in past] == ["user", "assistant"]
        assert [one for one in words if one in past[0]["content"]] == [word]
    idle(http)
    figures |= {
        "agents": len(clients),
        "refusals": sum(seen.refused for seen in visits),
        "total_s": percentiles([seen.total_s for seen in visits if seen.total_s]),
    }


def _say(http: httpx.Client, index: int) -> None:
    body = {
        "messages": [{"role": "user", "content": f"Remember {canary(index)}."}],
        "max_tokens": 8,
        "temperature": 0,
    }
    http.post("/v1/agents", json={"name": f"kept-{index}"}).raise_for_status()
    http.post(f"/v1/agents/kept-{index}/messages", json=body).raise_for_status()


MODEST = 20
GREEDY = 120
LENGTH = 150
LATE = 40
"""So many may end while the machine pauses between what the server does and what its clients see."""


def test_nobody_waits_for_another_agents_queue(server: Server, figures: dict[str, Any]) -> None:
    """S24: an agent with 120 requests waiting delays the single ones of 20 others by its share, no more.

    The bound is that of docs/architecture.md: with none of its own before it, a request is admitted after at
    most one of each agent. Those who run already come on top, as do those who run beside it. That it is kept
    to the letter tests/engine/test_fairness.py shows, without clocks.
    """
    greedy, modest, sent_at = asyncio.run(_unequal(server.url))
    ends = sorted(seen.ended_at for seen in (*greedy, *modest) if seen.ended_at and seen.ended_at > sent_at)
    ranks = sorted(ends.index(seen.ended_at) for seen in modest if seen.ended_at)
    assert len(ranks) == MODEST
    assert ranks[-1] < (MODEST + 1) + 2 * STEP + LATE, "somebody waited for more than the others' turns"
    waits = [seen.total_s for seen in modest if seen.total_s]
    figures |= {
        "ends_before_the_last_modest_one": ranks[-1],
        "ends_in_all": len(ends),
        "modest_s": percentiles(waits),
        "greedy_s": percentiles([seen.total_s for seen in greedy if seen.total_s]),
        "longest_modest_wait_to_median": round(max(waits) / statistics.median(waits), 2),
    }


async def _unequal(url: str) -> tuple[list[Visit], list[Visit], float]:
    """The greedy agent's visits, those of the modest ones, and when these began."""
    async with httpx.AsyncClient(
        base_url=url, timeout=WAIT_S, limits=httpx.Limits(max_connections=None)
    ) as http:
        greedy = [
            asyncio.create_task(visit(http, Client.asking("greedy", f"more {i}", LENGTH)))
            for i in range(GREEDY)
        ]
        end = time.monotonic() + WAIT_S
        while (await http.get("/health")).json()["engine"]["num_waiting"] < GREEDY // 2:
            assert time.monotonic() < end, "the greedy agent's requests never queued up"
        sent_at = time.monotonic()
        modest = [
            asyncio.create_task(visit(http, Client.asking(f"modest-{i}", f"one {i}", LENGTH)))
            for i in range(MODEST)
        ]
        return await asyncio.gather(*greedy), await asyncio.gather(*modest), sent_at


def test_threads_and_files_stay_flat(
    server: Server, http: httpx.Client, scale: Scale, figures: dict[str, Any]
) -> None:
    """S24: a connection of a client is an open file, and nothing else is; no client has a thread."""
    count = scale(100, 200)
    clients = crowd(count, 32)
    with Sampler(server):  # every pool of threads gets its size
        asyncio.run(visit_all(server.url, clients, count))
    idle(http)
    before = Holdings.of(server)
    rounds = []
    for _ in range(scale(2, 10)):
        with Sampler(server) as sampler:
            visits = asyncio.run(visit_all(server.url, clients, count))
        assert all(seen.is_whole for seen in visits)
        rounds.append(sampler.most)
        idle(http)
        after = settled(server, before)
    threads, files = max(most.threads for most in rounds), max(most.files for most in rounds)
    assert threads < before.threads + count // 4, "threads came with the clients"
    assert files <= before.files + count + 8, "files came with the clients, beside their connections"
    most = {"threads": threads, "files": files}
    figures |= {"clients": count, "before": vars(before), "most": most, "after": vars(after)}
