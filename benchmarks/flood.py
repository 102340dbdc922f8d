"""200 clients at once on an arena that holds five: `python -m benchmarks.flood [--clients 50]`. One JSON row.

Each client is an agent with a question of its own. One that is refused comes back after as long as it was
told to, as the SDKs do. Times are in seconds from a client's first attempt. At the end some of them ask once
more, alone: `exact` says that their replies were the same in the flood. `visit_all` is the flood for tests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.server import serve
from dormouse.bench.machine import describe

ARENA_HOLDS = 5
BLOCK = 128
PATIENCE_S = 300.0
NUM_CHECKED = 5
WORDS_PER_TOKEN = 0.75
TOO_MANY = 429


@dataclass(frozen=True)
class Client:
    """An agent, what was said so far with its question at the end, and the most tokens of the reply."""

    agent: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int

    @classmethod
    def asking(cls, agent: str, text: str, max_tokens: int) -> Client:
        """One who has said nothing before."""
        return cls(agent, ({"role": "user", "content": text},), max_tokens)

    @property
    def body(self) -> dict[str, Any]:
        """Its chat completion: greedy, streamed, of whatever model is served."""
        return {
            "model": "default",
            "messages": list(self.messages),
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "stream": True,
        }


@dataclass
class Visit:
    """One client's way through the flood. Moments are of the monotonic clock, None if it gave up; `told_s`
    are the waits that it was asked for, one for each refusal, in seconds."""

    begun_at: float
    told_s: list[int] = field(default_factory=list)
    first_token_at: float | None = None
    ended_at: float | None = None
    text: str = ""
    is_whole: bool = False

    @property
    def refused(self) -> int:
        """How often."""
        return len(self.told_s)

    @property
    def first_token_s(self) -> float | None:
        """From the first attempt."""
        return None if self.first_token_at is None else self.first_token_at - self.begun_at

    @property
    def total_s(self) -> float | None:
        """From the first attempt."""
        return None if self.ended_at is None else self.ended_at - self.begun_at


def question(index: int, context: int) -> str:
    """About `context` tokens that no other client sends."""
    words = [f"{index}", "carts", "of", "hay"] * int(context * WORDS_PER_TOKEN / 4)
    return f"I am client {index}. {' '.join(words)}. Who am I?"


async def visit(http: httpx.AsyncClient, client: Client) -> Visit:
    """Ask until answered, or until patience ends. Raises for every answer but a reply and a 429."""
    seen = Visit(time.monotonic())
    headers = {"x-agent-id": client.agent}
    while time.monotonic() < seen.begun_at + PATIENCE_S:
        async with http.stream("POST", "/v1/chat/completions", json=client.body, headers=headers) as answer:
            if answer.status_code != TOO_MANY:
                answer.raise_for_status()
                await _read(answer, seen)
                return seen
        seen.told_s.append(int(answer.headers["retry-after"]))
        await asyncio.sleep(seen.told_s[-1])
    return seen


async def _read(answer: httpx.Response, seen: Visit) -> None:
    async for line in answer.aiter_lines():
        if line == "data: [DONE]":
            seen.ended_at = time.monotonic()
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            for choice in event["choices"]:
                seen.text += choice["delta"].get("content", "")
                seen.is_whole |= choice["finish_reason"] is not None
                if seen.text and seen.first_token_at is None:
                    seen.first_token_at = time.monotonic()


async def visit_all(url: str, clients: Sequence[Client], at_once: int) -> list[Visit]:
    """All of these, so many at a time, each on a connection of its own."""
    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as http:
        return await asyncio.gather(*(visit(http, client) for client in clients))


def measure(num_clients: int, context: int, reply: int, max_queue: int) -> dict[str, Any]:
    """One row."""
    blocks = -(-(2 * context + reply) // BLOCK)
    flags = ("--arena-tokens", str((ARENA_HOLDS * blocks + 1) * BLOCK), "--max-queue", str(max_queue))
    clients = [Client.asking(f"agent-{i}", question(i, context), reply) for i in range(num_clients)]
    with (
        tempfile.TemporaryDirectory(prefix="dormouse-flood-") as folder,
        serve(Path(folder), *flags) as server,
    ):
        asyncio.run(visit_all(server.url, clients[:1], 1))  # what is made on first use
        process = psutil.Process(server.pid)
        before = process.num_threads(), process.num_fds()
        begin = time.monotonic()
        visits = asyncio.run(visit_all(server.url, clients, num_clients))
        seconds = time.monotonic() - begin
        alone = asyncio.run(visit_all(server.url, clients[:NUM_CHECKED], 1))
        after = process.num_threads(), process.num_fds()
        health = httpx.get(f"{server.url}/health").json()["engine"]
    answered = [seen for seen in visits if seen.ended_at is not None]
    return {
        "clients": num_clients,
        "answered": len(answered),
        "gave_up": num_clients - len(answered),
        "cut_short": sum(not seen.is_whole for seen in answered),
        "exact": all(seen.text == again.text for seen, again in zip(visits, alone, strict=False)),
        "refused": sum(seen.refused for seen in visits),
        "refused_once_or_more": sum(seen.refused > 0 for seen in visits),
        "seconds": round(seconds, 1),
        "first_token_s": percentiles([seen.first_token_s for seen in answered if seen.first_token_s]),
        "total_s": percentiles([seen.total_s for seen in answered if seen.total_s]),
        "preemptions": health["preemptions"],
        "left_behind": {"running": health["num_running"], "waiting": health["num_waiting"]},
        "threads": {"before": before[0], "after": after[0]},
        "open_files": {"before": before[1], "after": after[1]},
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """50th, 95th and 99th, rounded."""
    ordered = sorted(seconds)
    return {f"p{p}": round(ordered[int((len(ordered) - 1) * p / 100)], 2) for p in (50, 95, 99) if ordered}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--context", type=int, default=64, help="Tokens of each question, about.")
    parser.add_argument("--reply", type=int, default=8, help="Tokens of each reply.")
    parser.add_argument("--max-queue", type=int, default=100)
    args = parser.parse_args()
    row = measure(args.clients, args.context, args.reply, args.max_queue)
    sys.stdout.write(json.dumps({"benchmark": "flood", **row, "machine": describe()}) + "\n")


if __name__ == "__main__":
    main()
