"""What is known is not computed again: in the next turn, after sleep, after a restart, and for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.conversation import Conversation
from benchmarks.figures import Scale
from benchmarks.server import serve
from benchmarks.suite.conftest import FLAGS

pytestmark = pytest.mark.timeout(600)

REPLY = 8
FLOOR = 2.0
"""A first token from disk comes this many times sooner than a computed one; measured were over a hundred."""
OWN = 48
"""Most tokens of a prompt that are not of the system prompt which all agents share."""


def document(name: str, num_lines: int) -> str:
    """Some 14 tokens a line, other ones for each agent."""
    lines = (f"{name} saw {(n * len(name)) % 41} carts in the year {1700 + n}." for n in range(num_lines))
    return f"{' '.join(lines)} How many carts came in 1712?"


def test_the_next_turn_computes_what_is_new(
    http: httpx.Client, scale: Scale, figures: dict[str, Any]
) -> None:
    """S30: hot, from memory."""
    talk = Conversation("hot")
    first = talk.say(http, document("hot", scale(60, 250)), max_tokens=REPLY)
    second = talk.say(http, "And in 1713?", max_tokens=REPLY)
    assert second.cached_tokens >= first.prompt_tokens
    assert second.prompt_tokens - second.cached_tokens < OWN
    figures |= {
        "context": first.prompt_tokens,
        "first_ms": round(first.ttft_ms, 1),
        "next_ms": round(second.ttft_ms, 1),
        "computed_tokens": second.prompt_tokens - second.cached_tokens,
    }


def test_an_agent_that_slept_is_read_from_disk(
    http: httpx.Client, scale: Scale, figures: dict[str, Any]
) -> None:
    """S30: warm: all but one token from disk, sooner than computed, in the same words."""
    text = document("sleeper", scale(60, 250))
    first = Conversation("sleeper").say(http, text, max_tokens=REPLY)
    times = []
    for _ in range(scale(3, 10)):
        put = http.post("/v1/agents/sleeper/sleep").raise_for_status().json()
        assert (put["state"], put["released_blocks"] > 0) == ("asleep", True)
        before = http.get("/health").json()["engine"]["disk_tokens"]
        again = Conversation("sleeper").say(http, text, max_tokens=REPLY)
        read = http.get("/health").json()["engine"]["disk_tokens"] - before
        assert again.text == first.text
        assert again.prompt_tokens - again.cached_tokens == 1, "one token, whose logits are wanted"
        assert read == again.cached_tokens
        times.append(again.ttft_ms)
    figures |= {
        "context": first.prompt_tokens,
        "cold_ms": round(first.ttft_ms, 1),
        "wake_ms": [round(ms, 1) for ms in times],
    }
    assert FLOOR * min(times) < first.ttft_ms


def test_agents_wake_after_a_restart(tmp_path: Path, scale: Scale, figures: dict[str, Any]) -> None:
    """S30: in another process, in the same words."""
    names = [f"agent-{i}" for i in range(scale(2, 8))]
    texts = {name: document(name, scale(60, 250)) for name in names}
    with serve(tmp_path / "data", *FLAGS) as server, server.client() as http:
        first = {name: Conversation(name).say(http, texts[name], max_tokens=REPLY) for name in names}
        server.stop()
    with serve(tmp_path / "data", *FLAGS) as server, server.client() as http:
        again = {name: Conversation(name).say(http, texts[name], max_tokens=REPLY) for name in names}
        ready_s = server.ready_s
    for name in names:
        assert again[name].text == first[name].text
        assert again[name].prompt_tokens - again[name].cached_tokens == 1
    figures |= {
        "context": first[names[0]].prompt_tokens,
        "ready_s": round(ready_s, 2),
        "cold_ms": [round(first[name].ttft_ms, 1) for name in names],
        "wake_ms": [round(again[name].ttft_ms, 1) for name in names],
    }


def test_a_system_prompt_is_computed_once(http: httpx.Client, scale: Scale, figures: dict[str, Any]) -> None:
    """S30: agents that share one compute their own words."""
    system = {"role": "system", "content": document("everybody", scale(40, 150))}
    turns = [
        Conversation(f"sharer-{i}", [dict(system)]).say(http, f"I am number {i}. Hello.", max_tokens=REPLY)
        for i in range(scale(4, 20))
    ]
    computed = [turn.prompt_tokens - turn.cached_tokens for turn in turns]
    assert max(computed[1:]) < OWN < computed[0]
    figures |= {
        "agents": len(turns),
        "prompt": turns[0].prompt_tokens,
        "computed_tokens": computed,
        "first_token_ms": [round(turn.ttft_ms, 1) for turn in turns],
    }
