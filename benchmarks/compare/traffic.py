"""A client of any OpenAI-compatible server: streamed completions, with the time of every token."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx


class RequestFailed(Exception):
    """A request that was refused, broke off, or took longer than its limit; the message is for a row."""


class TookTooLong(RequestFailed):
    """A request that had not ended when its time was over."""


@dataclass(frozen=True)
class Ask:
    """One streamed, greedy completion. `limit_s` bounds it; `until` cuts it short from outside."""

    prompt: str
    max_tokens: int
    limit_s: float
    agent: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    until: threading.Event | None = None


@dataclass(frozen=True)
class Reply:
    """What came back. Times are seconds of the monotonic clock; `times` has one for each piece of text."""

    started: float
    times: tuple[float, ...]
    ended: float
    text: str
    prompt_tokens: int | None
    completion_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to the first text, or to the end of a reply whose tokens are no text."""
        return (self.times[0] if self.times else self.ended) - self.started

    def tokens_between(self, start: float, end: float) -> float:
        """Tokens that arrived after `start` and until `end`. A piece that carries several, as servers
        with speculation send, counts as many: the reply's tokens, spread evenly over its pieces."""
        inside = sum(start < moment <= end for moment in self.times)
        return inside * self.completion_tokens / max(1, len(self.times))


class Client:
    """Sends completions to one server. `fields` go into every body: a peer's own way to ignore the end."""

    def __init__(self, url: str, model: str, fields: dict[str, Any]) -> None:
        # A connection for each request: llama.cpp closes those that were idle while it was paused.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.Client(base_url=url, timeout=None, limits=limits)
        self._model = model
        self._fields = fields

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def post(self, path: str, body: dict[str, Any], limit_s: float) -> Any:
        """A call that is not a completion; its JSON answer. Raises RequestFailed."""
        try:
            answer = self._http.post(path, json=body, timeout=limit_s)
            if answer.is_error:
                raise RequestFailed(f"{path} answered {answer.status_code}: {answer.text[:200]}")
            return answer.json()
        except httpx.HTTPError as error:
            raise RequestFailed(f"{path} failed: {type(error).__name__}: {error}") from error

    def together(self, asks: Sequence[Ask]) -> list[Reply]:
        """All replies to requests that are sent at the same time. Raises RequestFailed."""
        with ThreadPoolExecutor(len(asks)) as pool:
            return list(pool.map(self.complete, asks))

    def complete(self, ask: Ask) -> Reply:
        """The reply to one request. Raises RequestFailed, TookTooLong."""
        body = {
            "model": self._model,
            "prompt": ask.prompt,
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._fields,
            **ask.fields,
        }
        headers = {"x-agent-id": ask.agent} if ask.agent else {}
        started = time.monotonic()
        try:
            lines = self._lines(body, headers, ask, started)
        except httpx.TimeoutException as error:
            raise TookTooLong(f"did not finish within {ask.limit_s:g} s") from error
        except httpx.HTTPError as error:
            raise RequestFailed(f"the connection broke: {type(error).__name__}: {error}") from error
        return _reply(started, time.monotonic(), lines)

    def _lines(
        self, body: dict[str, Any], headers: dict[str, str], ask: Ask, started: float
    ) -> list[tuple[float, str]]:
        """The stream's lines with their times. They are parsed later: here the client shares the cores."""
        lines = []
        limit = httpx.Timeout(ask.limit_s)
        with self._http.stream(
            "POST", "/v1/completions", json=body, headers=headers, timeout=limit
        ) as answer:
            if answer.is_error:
                raise RequestFailed(f"answered {answer.status_code}: {answer.read().decode()[:200]}")
            for line in answer.iter_lines():
                now = time.monotonic()
                if now > started + ask.limit_s:
                    raise TookTooLong(f"did not finish within {ask.limit_s:g} s")
                lines.append((now, line))
                if ask.until is not None and ask.until.is_set():
                    break
        return lines


def _reply(started: float, ended: float, lines: list[tuple[float, str]]) -> Reply:
    times: list[float] = []
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    for moment, line in lines:
        if not line.startswith("data: {"):
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise RequestFailed(f"broke off: {str(chunk['error'])[:200]}")
        usage = chunk.get("usage") or usage
        text = "".join(choice.get("text") or "" for choice in chunk.get("choices", ()))
        if text:
            times.append(moment)
            pieces.append(text)
    counted = usage.get("completion_tokens", len(times))
    return Reply(started, tuple(times), ended, "".join(pieces), usage.get("prompt_tokens"), counted)
