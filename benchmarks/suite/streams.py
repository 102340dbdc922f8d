"""Streamed replies with the moment of each token."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Prompt:
    """What an agent is asked, and how many tokens it answers, whatever it would end with."""

    agent: str
    text: str
    num_tokens: int

    @property
    def body(self) -> dict[str, Any]:
        """As a chat completion."""
        return {
            "model": "default",
            "messages": [{"role": "user", "content": self.text}],
            "temperature": 0,
            "max_tokens": self.num_tokens,
            "ignore_eos": True,
            "stream": True,
        }


@dataclass
class Stream:
    """A reply as it came; `times` has the moment of each piece, on the monotonic clock."""

    asked_at: float
    text: str = ""
    times: list[float] = field(default_factory=list)

    @property
    def first_token_s(self) -> float:
        """From asking."""
        return self.times[0] - self.asked_at

    def pieces_between(self, start: float, end: float) -> int:
        """How many came after `start`, up to `end`."""
        return sum(start < moment <= end for moment in self.times)


async def read(http: httpx.AsyncClient, prompt: Prompt, started: asyncio.Event | None = None) -> Stream:
    """Ask, and read to the end. `started` is set with the first piece."""
    seen = Stream(time.monotonic())
    headers = {"x-agent-id": prompt.agent}
    async with http.stream("POST", "/v1/chat/completions", json=prompt.body, headers=headers) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line.removeprefix("data: "))["choices"]
            if piece := "".join(choice["delta"].get("content", "") for choice in choices):
                seen.times.append(time.monotonic())
                seen.text += piece
                if started is not None:
                    started.set()
    return seen


def connect(url: str) -> httpx.AsyncClient:
    """A client without a bound on connections; the caller closes it."""
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None))


async def read_all(url: str, prompts: Sequence[Prompt]) -> list[Stream]:
    """All of these at once."""
    async with connect(url) as http:
        return await asyncio.gather(*(read(http, prompt) for prompt in prompts))


async def read_beside(url: str, prompts: Sequence[Prompt], late: Prompt) -> tuple[list[Stream], Stream]:
    """All of these at once, and one that is asked when each of them has begun to answer."""
    async with connect(url) as http:
        started = [asyncio.Event() for _ in prompts]
        running = [
            asyncio.create_task(read(http, prompt, begun))
            for prompt, begun in zip(prompts, started, strict=True)
        ]
        async with asyncio.timeout(TIMEOUT_S):
            for begun in started:
                await begun.wait()
        comer = await read(http, late)
        return await asyncio.gather(*running), comer
