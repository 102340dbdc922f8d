"""One agent's conversation over the chat API, with the time to the first token of each reply."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

DURABLE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Turn:
    """A reply: its text, and where its prompt came from."""

    text: str
    ttft_ms: float
    prompt_tokens: int
    cached_tokens: int


@dataclass
class Conversation:
    """Sends the whole conversation each time, as every client of a stateless API does."""

    name: str
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, client: httpx.Client, text: str, *, max_tokens: int) -> Turn:
        """One turn, streamed and greedy."""
        self.messages.append({"role": "user", "content": text})
        body = {
            "model": "smollm2",
            "messages": self.messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        turn = _stream(client, body, {"x-agent-id": self.name})
        self.messages.append({"role": "assistant", "content": turn.text})
        return turn

    def wait_until_durable(self, client: httpx.Client) -> None:
        """Return once all of the agent's computed tokens are on disk. Raises TimeoutError."""
        deadline = time.monotonic() + DURABLE_TIMEOUT_S
        while time.monotonic() < deadline:
            agent = client.get(f"/v1/agents/{self.name}").json()
            # The last sampled token is never computed: there is nothing to store of it.
            if agent["durable_tokens"] >= agent["tokens"] - 1:
                return
            time.sleep(0.02)
        raise TimeoutError(f"agent {self.name} is not durable after {DURABLE_TIMEOUT_S:g} s")


def _stream(client: httpx.Client, body: dict[str, Any], headers: dict[str, str]) -> Turn:
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    first = 0.0
    started = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        if answer.is_error:
            raise RuntimeError(answer.read().decode())
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            usage = chunk.get("usage") or usage
            piece = "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
            if piece and not first:
                first = time.perf_counter() - started
            pieces.append(piece)
    return Turn(
        "".join(pieces),
        1000 * (first or time.perf_counter() - started),
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
    )
