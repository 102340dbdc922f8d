"""Sends one request until it is answered, as a client with good manners does, and notes each attempt."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httpx

from benchmarks.soak.dialects import DIALECTS, Ask, Dialect
from benchmarks.soak.host import Host
from benchmarks.soak.replies import Attempt, Outcome, Reply

REQUEST_LIMIT_S = 180.0
_MOST_ATTEMPTS = 40
_BUSY_STATUS = (429, 529)
_BUSY_CODE = "rate_limit_exceeded"
_TOLD = re.compile(r"try again in (\d+)s")
"""How a stream of Responses says what `Retry-After` says elsewhere."""


Recover = Callable[[], Awaitable[Reply | None]]
"""Looks whether the server has the reply that its client was not told of."""


class NotAnswered(Exception):
    """The request failed in a way that nobody meant; its attempt says how."""


@dataclass
class Client:
    """All agents' way to the server."""

    host: Host
    http: httpx.AsyncClient
    attempts: list[Attempt] = field(default_factory=list)
    num_crowds: int = 0
    """Crowds that are there now. While there is one, to be refused is what is to happen."""
    last_crowd_end: float = float("-inf")

    async def ask(
        self,
        kind: str,
        dialect: str,
        ask: Ask,
        *,
        leave_after: int | None = None,
        recover: Recover | None = None,
    ) -> Reply:
        """The whole reply; after `leave_after` pieces of text the client leaves with what it has.

        After a restart `recover` may have the reply already, which then is not asked for again. Raises
        NotAnswered.
        """
        for _ in range(_MOST_ATTEMPTS):
            await self.host.until_up()
            attempt = Attempt(kind, ask.agent, dialect, self.host.now, ask.max_tokens)
            attempt.in_crowd = self._is_crowded(attempt.at)
            reply = Reply()
            wait_s = await self._try(DIALECTS[dialect], ask, attempt, reply, leave_after)
            attempt.total_s = self.host.now - attempt.at
            attempt.in_crowd |= self._is_crowded(attempt.at)
            attempt.take(reply)
            self.attempts.append(attempt)
            if attempt.outcome in (Outcome.OK, Outcome.LEFT):
                return reply
            if attempt.outcome is Outcome.ERROR:
                raise NotAnswered(attempt.detail)
            await asyncio.sleep(wait_s)
            if attempt.outcome is Outcome.RESTART and recover and (found := await recover()):
                return found
        raise NotAnswered(f"not answered in {_MOST_ATTEMPTS} attempts")

    async def _try(
        self, dialect: Dialect, ask: Ask, attempt: Attempt, reply: Reply, leave_after: int | None
    ) -> float:
        """One attempt; how long to wait before the next, if there is to be one."""
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                return await self._stream(dialect, ask, attempt, reply, leave_after)
        except TimeoutError:
            attempt.detail = f"no end after {REQUEST_LIMIT_S:g} s"
        except httpx.TransportError as error:
            attempt.detail = f"{type(error).__name__}: {error}"
        if self.host.was_down(attempt.at):
            attempt.outcome = Outcome.RESTART
        return 0.2

    async def _stream(
        self, dialect: Dialect, ask: Ask, attempt: Attempt, reply: Reply, leave_after: int | None
    ) -> float:
        url, headers = self.host.url + dialect.path(ask), {"x-agent-id": ask.agent}
        begin = last = time.monotonic()
        num_pieces = 0
        async with self.http.stream("POST", url, json=dialect.body(ask), headers=headers) as answer:
            if answer.is_error:
                body = (await answer.aread()).decode(errors="replace")
                return self._refused(attempt, answer, body)
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                length = len(reply.text) + len(reply.calls)
                dialect.read(json.loads(line.removeprefix("data: ")), reply)
                if len(reply.text) + len(reply.calls) == length:
                    continue
                now = time.monotonic()
                if attempt.first_s is None:
                    attempt.first_s = now - begin
                else:
                    attempt.gaps_ms.append(1000 * (now - last))
                last = now
                num_pieces += 1
                if num_pieces == leave_after:
                    attempt.outcome = Outcome.LEFT
                    return 0.0
        return self._ended(attempt, reply)

    def _ended(self, attempt: Attempt, reply: Reply) -> float:
        """What a stream that came to its end was."""
        if reply.is_whole and not reply.error:
            attempt.outcome = Outcome.OK
            return 0.0
        attempt.detail = f"{reply.error_code}: {reply.error}" if reply.error else "the stream broke off"
        told = _TOLD.search(reply.error)
        if reply.error_code == _BUSY_CODE and told and self._is_crowded(attempt.at):
            attempt.outcome = Outcome.REFUSED
            return float(told[1])
        if self.host.was_down(attempt.at):
            attempt.outcome = Outcome.RESTART
        return 0.2

    def _refused(self, attempt: Attempt, answer: httpx.Response, body: str) -> float:
        """What a status of 400 or more means. To be refused is right in a crowd, with Retry-After."""
        wait = answer.headers.get("retry-after", "")
        attempt.detail = f"{answer.status_code}: {body[:300]}"
        if answer.status_code in _BUSY_STATUS:
            if not wait.isdigit():
                attempt.detail = f"{answer.status_code} without Retry-After"
            elif self._is_crowded(attempt.at):
                attempt.outcome = Outcome.REFUSED
                return float(wait)
        elif answer.status_code == httpx.codes.SERVICE_UNAVAILABLE and self.host.was_down(attempt.at):
            attempt.outcome = Outcome.RESTART
        return 0.2

    def _is_crowded(self, since: float) -> bool:
        return self.num_crowds > 0 or self.last_crowd_end >= since
