"""200 clients at once on an arena that holds five: `python -m benchmarks.flood [--clients 50]`. One JSON row.

Each client is an agent with a question of its own. One that is refused comes back after as long as it was
told to, as the SDKs do. Times are in seconds from a client's first attempt. At the end some of them ask once
more, alone: `exact` says that their replies were the same in the flood.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import dataclass
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


@dataclass
class Visit:
    """One client's way through the flood; times in seconds from its first attempt, None if it gave up."""

    refused: int = 0
    first_token_s: float | None = None
    total_s: float | None = None
    text: str = ""
    is_whole: bool = False


def question(index: int, context: int) -> str:
    """About `context` tokens that no other client sends."""
    words = [f"{index}", "carts", "of", "hay"] * int(context * WORDS_PER_TOKEN / 4)
    return f"I am client {index}. {' '.join(words)}. Who am I?"


async def visit(http: httpx.AsyncClient, index: int, context: int, reply: int) -> Visit:
    """Ask until answered, or until patience ends."""
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": question(index, context)}],
        "temperature": 0,
        "max_tokens": reply,
        "stream": True,
    }
    seen = Visit()
    begin = time.monotonic()
    while time.monotonic() < begin + PATIENCE_S:
        headers = {"x-agent-id": f"agent-{index}"}
        async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            if answer.status_code != TOO_MANY:
                answer.raise_for_status()
                await _read(answer, seen, begin)
                return seen
        seen.refused += 1
        await asyncio.sleep(float(answer.headers["retry-after"]))
    return seen


async def _read(answer: httpx.Response, seen: Visit, begin: float) -> None:
    async for line in answer.aiter_lines():
        if line == "data: [DONE]":
            seen.total_s = time.monotonic() - begin
        elif line.startswith("data: "):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                seen.text += choice["delta"].get("content", "")
                seen.is_whole |= choice["finish_reason"] is not None
                if seen.text and seen.first_token_s is None:
                    seen.first_token_s = time.monotonic() - begin


async def visit_all(url: str, clients: range, context: int, reply: int, at_once: int) -> list[Visit]:
    """All of these, so many at a time, each on a connection of its own."""
    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as http:
        return await asyncio.gather(*(visit(http, index, context, reply) for index in clients))


def measure(num_clients: int, context: int, reply: int, max_queue: int) -> dict[str, Any]:
    """One row."""
    blocks = -(-(2 * context + reply) // BLOCK)
    flags = ("--arena-tokens", str((ARENA_HOLDS * blocks + 1) * BLOCK), "--max-queue", str(max_queue))
    with (
        tempfile.TemporaryDirectory(prefix="dormouse-flood-") as folder,
        serve(Path(folder), *flags) as server,
    ):
        asyncio.run(visit_all(server.url, range(1), context, reply, 1))  # what is made on first use
        process = psutil.Process(server.pid)
        before = process.num_threads(), process.num_fds()
        begin = time.monotonic()
        visits = asyncio.run(visit_all(server.url, range(num_clients), context, reply, num_clients))
        seconds = time.monotonic() - begin
        checked = range(min(NUM_CHECKED, num_clients))
        alone = asyncio.run(visit_all(server.url, checked, context, reply, 1))
        after = process.num_threads(), process.num_fds()
        health = httpx.get(f"{server.url}/health").json()["engine"]
    answered = [seen for seen in visits if seen.total_s is not None]
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
