"""What the agents of a soak share: the way to the server, the texts, the end, and what is wrong."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.soak.client import Client
from benchmarks.soak.mix import Mix
from benchmarks.soak.session import Session
from benchmarks.soak.words import Canaries, Words

_CALL_LIMIT_S = 60.0
_MOST_CALLS = 40


@dataclass
class World:
    """Shared by all agents. `seconds` is the run's length; `problems` are broken promises, as sentences."""

    client: Client
    mix: Mix
    seed: int
    seconds: float
    words: Words = field(default_factory=Words)
    canaries: Canaries = field(default_factory=Canaries)
    sessions: list[Session] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_histories: int = 0
    """Histories of agents that were compared with what their clients were told."""
    num_continued: int = 0
    """Replies that were asked for again and compared with the part that was seen before."""
    num_calls: int = 0

    def chance(self, name: str) -> random.Random:
        """An agent's own random choices: the same in each run of a seed, whoever comes first."""
        return random.Random(f"{self.seed}/{name}")

    @property
    def num_lives(self) -> int:
        """Lives of the server so far."""
        return len(self.client.host.lives)

    async def call(self, method: str, path: str, body: Any = None, *, gone_is_fine: bool = False) -> Any:
        """A call beside the replies, its JSON answer; made again where a restart came between.

        Anything else that is not 2xx is a problem, and the answer None; so is a 404, unless `gone_is_fine` or
        a first try may have done what was asked for.
        """
        host = self.client.host
        for number in range(_MOST_CALLS):
            await host.until_up()
            begin = host.now
            try:
                answer = await self.client.http.request(
                    method, host.url + path, json=body, timeout=_CALL_LIMIT_S
                )
            except httpx.TransportError as error:
                if not host.was_down(begin):
                    self.problems.append(f"{method} {path}: {type(error).__name__}: {error}")
                    return None
                await asyncio.sleep(0.2)
                continue
            self.num_calls += 1
            if answer.is_success:
                return answer.json()
            if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE and host.was_down(begin):
                await asyncio.sleep(0.2)
                continue
            repeated = number > 0 and answer.status_code in (httpx.codes.NOT_FOUND, httpx.codes.CONFLICT)
            if not repeated and not (gone_is_fine and answer.status_code == httpx.codes.NOT_FOUND):
                self.problems.append(f"{method} {path}: {answer.status_code}: {answer.text[:200]}")
            return None
        self.problems.append(f"{method} {path}: no answer in {_MOST_CALLS} attempts")
        return None
