"""More requests than the arena and the queue hold: who is refused is told when to come back, and is served
then; nothing is left behind; and who had to make room in between says what it would have said."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.figures import Scale
from benchmarks.flood import TOO_MANY, Client, percentiles, visit, visit_all
from benchmarks.server import Server
from tests.fake_server import PAGE, fake_server
from tests.live import WAIT_S, at_once, strict_server
from tests.stress.watch import Holdings, idle, metrics, settled, state

from dormouse.models.folder import ModelFolder

pytestmark = pytest.mark.timeout(600)

HELD = 5
"""So many of the flood's clients fit into the arena at a time, and into a step."""
PAGES = 256
QUEUE = 20
LONG = "canary-{0:04} " * 50
REPLY = 24
PATIENT_ROUNDS = 3
TRIES = 3
OVERLOADED = 529
"""What Anthropic's clients know a full server by."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("exhausted")
    flags = ("--pages", str(PAGES), "--max-running", str(HELD), "--max-queue", str(QUEUE))
    with fake_server(folder / "data", *flags) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def flood(server: Server, prefix: str, count: int) -> list[Client]:
    """Clients of long prompts, each with words of its own. Some replies come first, so that the server knows
    its pace: before, it can only guess when there will be room."""
    known = [Client.asking(f"{prefix}-pace-{i}", f"{prefix} pace {i}", 4) for i in range(4 * HELD)]
    asyncio.run(visit_all(server.url, known, HELD))
    return [Client.asking(f"{prefix}-{i}", f"{prefix} {LONG.format(i)}", REPLY) for i in range(count)]


def test_who_is_refused_is_told_when_to_come_back_and_is_served_then(
    server: Server, http: httpx.Client, scale: Scale, figures: dict[str, Any]
) -> None:
    """S23: over a hundred at once; each refusal has its Retry-After, who keeps to it gets its reply."""
    clients = flood(server, "told", scale(120, 500))
    visits = asyncio.run(visit_all(server.url, clients, len(clients)))
    assert all(seen.is_whole for seen in visits)
    assert len({seen.text for seen in visits}) == len(clients), "words of their own"
    refused = [seen for seen in visits if seen.refused]
    assert refused, "the queue was never full"
    assert all(1 <= told <= 60 for seen in refused for told in seen.told_s)
    num_refusals = sum(seen.refused for seen in refused)
    assert num_refusals <= PATIENT_ROUNDS * len(refused), "there was no room at the time that was told"
    idle(http)
    figures |= {
        "clients": len(clients),
        "refused_once_or_more": len(refused),
        "refusals": num_refusals,
        "most_refusals_of_one": max(seen.refused for seen in refused),
        "told_s": percentiles([float(told) for seen in refused for told in seen.told_s]),
        "total_s": percentiles([seen.total_s for seen in visits if seen.total_s]),
    }


DIALECTS: dict[str, tuple[int, dict[str, Any]]] = {
    "/v1/chat/completions": (TOO_MANY, {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}),
    "/v1/messages": (OVERLOADED, {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}),
    "/v1/responses": (TOO_MANY, {"input": "hello", "max_output_tokens": 4}),
    "/v1/completions": (TOO_MANY, {"prompt": "hello", "max_tokens": 4}),
}


TOLD_IN_THE_STREAM = 5
"""A response that is streamed: its clients take a status of 429 for the end of their turn."""


def test_a_full_server_refuses_in_every_dialect(server: Server, http: httpx.Client) -> None:
    """S23: a 429 (in Anthropic's dialect 529) with Retry-After in its envelope, streamed or not; never a
    stream that is empty."""
    answers, agents, health = asyncio.run(_probe_when_full(server.url, HELD + QUEUE))
    told = answers.pop(TOLD_IN_THE_STREAM)
    assert "event: response.failed" in told.text
    assert "queue is full" in told.text
    expected = [status for status, _ in DIALECTS.values() for _ in range(2)]
    del expected[TOLD_IN_THE_STREAM]
    assert [answer.status_code for answer in answers] == expected
    for answer in answers:
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert "queue is full" in answer.json()["error"]["message"]
    assert agents.status_code == 200, "what needs no turn is answered"
    assert "queue_nearly_full" in [reason["code"] for reason in health["reasons"]]
    idle(http)
    assert http.get("/health").json()["status"] == "ok"


async def _probe_when_full(
    url: str, num_open: int
) -> tuple[list[httpx.Response], httpx.Response, dict[str, Any]]:
    """What a server with so many open requests answers to others; those who hold it leave afterwards."""
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as http:
        holders = [
            asyncio.create_task(visit(http, Client.asking(f"holder-{i}", f"hold {i}", 3500)))
            for i in range(num_open)
        ]
        async with asyncio.timeout(WAIT_S):
            while (await http.get("/admin/state")).json()["queue"]["open"] < num_open:
                await asyncio.sleep(0)
        probes = (
            http.post(path, json={"model": "default", "stream": stream, **body})
            for path, (_, body) in DIALECTS.items()
            for stream in (False, True)
        )
        answers = await asyncio.gather(*probes)
        agents = await http.get("/v1/agents", params={"limit": 1})
        health = (await http.get("/health")).json()
        for holder in holders:
            holder.cancel()
        await asyncio.gather(*holders, return_exceptions=True)
    return answers, agents, health


def test_after_the_flood_requests_are_served_without_waiting(
    server: Server, http: httpx.Client, scale: Scale, figures: dict[str, Any]
) -> None:
    """S23: as many as fit are admitted at once again, none is refused, and none waits."""
    before = _uncrowded(server, http, "before")
    clients = flood(server, "recovery", scale(60, 300))
    visits = asyncio.run(visit_all(server.url, clients, len(clients)))
    assert any(seen.refused for seen in visits)
    idle(http)
    after = _uncrowded(server, http, "after")
    figures |= {"before": before, "after": after}


def _uncrowded(server: Server, http: httpx.Client, name: str) -> dict[str, float]:
    """As many long replies as fit, together: all run at once, nobody waits for another. Figures of them.

    Asked for again when the machine paused for so long that they came one after the other.
    """
    for number in range(TRIES):
        preemptions = http.get("/health").json()["engine"]["preemptions"]
        earlier = metrics(http)
        clients = [Client.asking(f"{name}-{number}-{i}", f"{name} {number} {i}", 700) for i in range(HELD)]
        most_running = 0
        with ThreadPoolExecutor(1) as thread:
            begun = time.monotonic()
            replies = thread.submit(lambda those: asyncio.run(visit_all(server.url, those, HELD)), clients)
            while not replies.done():
                most_running = max(most_running, http.get("/health").json()["engine"]["num_running"])
            visits = replies.result()
            seconds = time.monotonic() - begun
        assert all(seen.is_whole and not seen.refused for seen in visits)
        assert idle(http)["preemptions"] == preemptions
        if most_running == HELD:
            break
    else:
        raise AssertionError(f"{most_running} of {HELD} ran at once")
    now = metrics(http)
    waited = now[("dormouse_queue_seconds_sum", ())] - earlier[("dormouse_queue_seconds_sum", ())]
    return {
        "tokens_per_s": round(HELD * 700 / seconds),
        "queued_ms": round(1000 * waited / HELD, 2),
    }


def test_no_page_is_lost_in_floods_with_clients_that_leave(
    server: Server, http: httpx.Client, scale: Scale, figures: dict[str, Any]
) -> None:
    """S23: after every round all pages are idle or free, and threads and files are what they were. When the
    server ends, it checks its books."""
    rounds: list[Holdings] = []
    clients = flood(server, "leak", 40)
    leavers = [Client.asking(f"leaver-{i}", f"leave {LONG.format(i)}", 300) for i in range(20)]
    at_once([partial(metrics, http)] * 32)  # every pool of threads gets its size
    for _ in range(scale(3, 25)):
        visits = asyncio.run(_mixed(server.url, clients, leavers))
        assert all(visits)
        engine = idle(http)
        pages = {value: metrics(http)[("dormouse_pages", (value,))] for value in ("used", "idle", "free")}
        assert pages["used"] == 0
        assert pages["idle"] + pages["free"] == engine["pages_total"] == PAGES
        assert state(http)["queue"]["open"] == 0
        rounds.append(settled(server, rounds[0]) if rounds else Holdings.of(server))
    figures |= {"rounds": len(rounds), "first": vars(rounds[0]), "last": vars(rounds[-1])}


async def _mixed(url: str, clients: list[Client], leavers: list[Client]) -> list[bool]:
    """Whether each who stayed has got its reply; the others are gone after the first bytes."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        leaving = [asyncio.create_task(_leave(http, client)) for client in leavers]
        visits = await visit_all(url, clients, len(clients))
        await asyncio.gather(*leaving)
    return [seen.is_whole for seen in visits]


async def _leave(http: httpx.AsyncClient, client: Client) -> None:
    headers = {"x-agent-id": client.agent}
    async with http.stream("POST", "/v1/chat/completions", json=client.body, headers=headers) as answer:
        async for _ in answer.aiter_raw():
            return


@dataclass(frozen=True)
class Cramped:
    """A server where replies grow beyond the arena, and one where the same ones have room."""

    count: int
    prompt: str
    reply: int
    cramped: AbstractContextManager[Server]
    roomy: AbstractContextManager[Server]


@pytest.fixture(params=["fake", "torch"])
def cramped(request: pytest.FixtureRequest, tmp_path: Path) -> Cramped:
    if request.param == "fake":
        flags = ("--max-running", "16", "--pages")
        return Cramped(
            24,
            "the past of client {0} and what it says",
            200,
            fake_server(tmp_path / "cramped", *flags, "48"),
            fake_server(tmp_path / "roomy", *flags, "1024"),
        )
    folder: ModelFolder = request.getfixturevalue("smollm2")
    torch = ("--model", str(folder.path), "--block-size", str(PAGE), "--arena-tokens")
    return Cramped(
        4,
        "I am client {0}. Tell me the story of {0} dormice and a lighthouse.",
        64,
        strict_server(tmp_path / "cramped", *torch, "256", dev_mode=False),
        strict_server(tmp_path / "roomy", *torch, "8192", dev_mode=False),
    )


def test_preempted_requests_finish_token_for_token(cramped: Cramped, figures: dict[str, Any]) -> None:
    """S23: who had to make room says the same as alone, to the token and to the bit of its probability."""
    indices = range(cramped.count)
    with cramped.roomy as server, server.client() as http:
        alone = [_tokens(http, cramped, index) for index in indices]
    with cramped.cramped as server, server.client() as http:
        together = at_once([partial(_tokens, http, cramped, index) for index in indices])
        preemptions = idle(http)["preemptions"]
    assert preemptions > 0, "nobody had to make room"
    assert together == alone
    figures |= {"requests": cramped.count, "preemptions": preemptions}


def _tokens(http: httpx.Client, cramped: Cramped, index: int) -> list[tuple[str, float]]:
    """A whole reply: each token, and the logarithm of its probability."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": cramped.prompt.format(index)}],
        "temperature": 0,
        "max_tokens": cramped.reply,
        "ignore_eos": True,
        "logprobs": True,
    }
    headers = {"x-agent-id": f"agent-{index}"}
    answer = http.post("/v1/chat/completions", json=body, headers=headers).raise_for_status().json()
    assert answer["usage"]["completion_tokens"] == cramped.reply
    content = answer["choices"][0]["logprobs"]["content"]
    return [(entry["token"], entry["logprob"]) for entry in content]
