"""200 connections at once: an answer or a 429 for each, no word mixed up, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from tests.api.conftest import Service, serving
from tests.engine.harness import WAIT_S

from dormouse.runtimes.fake import FakeRuntime
from dormouse.store.block_store import BlockStore

CLIENTS = 200
MAX_TOKENS = 24
MOST_ROUNDS = 20
ANSWER_S = 120.0
"""For more than a hundred replies, five at a time, on a busy machine."""


class Answer(NamedTuple):
    """What one client got. `text` is None for a refusal."""

    status: int
    text: str | None
    retry_after: str | None


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[Service]:
    """A server with an arena for about five of the clients."""
    with serving(tmp_path, FakeRuntime(48), max_running=16, max_queue=100) as service:
        yield service


async def ask(http: httpx.AsyncClient, index: int) -> Answer:
    """One client's question, with a word of its own in it; every other one streams."""
    content = f"canary-{index:03} " * 9
    body = {
        "model": "fake",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": index % 2 == 0,
    }
    answer = await http.post("/v1/chat/completions", json=body, headers={"x-agent-id": f"agent {index % 50}"})
    retry_after = answer.headers.get("retry-after")
    if answer.status_code != 200:
        return Answer(answer.status_code, None, retry_after)
    if not body["stream"]:
        return Answer(200, answer.json()["choices"][0]["message"]["content"], retry_after)
    frames = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert frames[-1] == "[DONE]", "the stream was cut"
    choices = [choice for frame in frames[:-1] for choice in json.loads(frame)["choices"]]
    assert choices[-1]["finish_reason"] == "length"
    return Answer(200, "".join(choice["delta"].get("content", "") for choice in choices), retry_after)


async def ask_all(url: str, indices: list[int], at_once: int) -> dict[int, Answer]:
    """The answers to these clients, so many of them at a time, each on a connection of its own."""
    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S, limits=limits) as http:
        answers = await asyncio.gather(*(ask(http, index) for index in indices))
    return dict(zip(indices, answers, strict=True))


@pytest.mark.timeout(600)
def test_everyone_of_200_connections_is_answered_and_by_his_own_words(crowded: Service) -> None:
    url, store = crowded.url, crowded.store
    everyone = list(range(CLIENTS))
    alone = asyncio.run(ask_all(url, everyone[::10], at_once=1))
    first = asyncio.run(ask_all(url, everyone, at_once=CLIENTS))  # every pool of threads gets its size
    before = _resources(store)

    answers: dict[int, Answer] = {}
    refused = everyone
    for _ in range(MOST_ROUNDS):
        round_ = asyncio.run(ask_all(url, refused, at_once=len(refused)))
        assert {answer.status for answer in round_.values()} <= {200, 429}
        answers |= {index: answer for index, answer in round_.items() if answer.status == 200}
        told = [answer.retry_after for answer in round_.values() if answer.status == 429]
        assert all(wait is not None and 1 <= int(wait) <= 60 for wait in told)
        refused = [index for index, answer in round_.items() if answer.status == 429]
        if not refused:
            break
    assert not refused
    assert {index: answers[index] for index in alone} == alone, "word for word"
    assert all(answer == answers[index] for index, answer in first.items() if answer.status == 200)
    assert len({answer.text for answer in answers.values()}) == CLIENTS

    health = httpx.get(f"{url}/health").json()
    assert (health["engine"]["num_running"], health["engine"]["num_waiting"]) == (0, 0)
    deadline = time.monotonic() + WAIT_S
    while _more_than(before, _resources(store)) and time.monotonic() < deadline:
        time.sleep(0.02)  # the server closes its sides of the connections
    assert not _more_than(before, _resources(store))
    plain = [thread.name for thread in threading.enumerate() if "AnyIO" in thread.name]
    assert not plain, "a plain function among the routes or what they depend on takes a thread each time"


def _more_than(before: tuple[int, int], now: tuple[int, int]) -> bool:
    return now[0] > before[0] or now[1] > before[1]


def _resources(store: BlockStore) -> tuple[int, int]:
    """Threads, and open files."""
    store.flush()
    gc.collect()
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
