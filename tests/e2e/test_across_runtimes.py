"""An agent of one runtime is an agent of the other: its blocks have no runtime in them.

The words after waking are those of the runtime that continues, over a past that the other one has computed.
The two round differently, so their logits for one past differ a little, and a reply may part from the cold
run's where two tokens are nearly alike: what is held here is the distance of the log probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.live import strict_server

from dormouse.models.runtimes import RuntimeName

pytestmark = [pytest.mark.usefixtures("smollm2"), pytest.mark.timeout(300)]

BOTH_WAYS = pytest.mark.parametrize(("first", "second"), [("torch", "mlx"), ("mlx", "torch")])
FLAGS = ("--arena-tokens", "4096")
REPLY = 8
TOLERANCE = 0.6
"""Of a log probability among the five largest, in nats, between waking on the other's KV and a cold run. Most
of it is torch rounding activations to 8 bits, as it does by default."""

TEXT = " ".join(
    f"In year {year} the harvest of the valley was {year % 37} carts." for year in range(1700, 1724)
)
QUESTION = f"{TEXT}\nHow many carts came in 1712?"


def ask(http: httpx.Client, name: str, *texts: str) -> dict[str, Any]:
    """The answer to a conversation of user and assistant turns, greedy, with log probabilities."""
    roles = ("user", "assistant")
    messages = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(texts)]
    body = {
        "model": "default",
        "messages": messages,
        "temperature": 0,
        "max_tokens": REPLY,
        "logprobs": True,
        "top_logprobs": 5,
    }
    answer = http.post("/v1/chat/completions", json=body, headers={"x-agent-id": name})
    document: dict[str, Any] = answer.raise_for_status().json()
    return document


def said(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def missing(answer: dict[str, Any]) -> int:
    """Prompt tokens that were computed."""
    usage = answer["usage"]
    count: int = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    return count


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of log probabilities of the first token, over those that both list."""
    firsts = [answer["choices"][0]["logprobs"]["content"][0] for answer in (one, other)]
    tops = [{top["token"]: top["logprob"] for top in first["top_logprobs"]} for first in firsts]
    common = tops[0].keys() & tops[1].keys()
    assert len(common) >= 3, tops
    return float(max(abs(tops[0][token] - tops[1][token]) for token in common))


@BOTH_WAYS
def test_an_agent_wakes_under_the_other_runtime(
    tmp_path: Path, first: RuntimeName, second: RuntimeName, record_property: Callable[[str, Any], None]
) -> None:
    with strict_server(tmp_path / "cold", *FLAGS, runtime=second) as server, server.client() as http:
        cold = ask(http, "a", QUESTION)
    with strict_server(tmp_path / "data", *FLAGS, runtime=first) as server, server.client() as http:
        before = ask(http, "a", QUESTION)
    with strict_server(tmp_path / "data", *FLAGS, runtime=second) as server, server.client() as http:
        assert http.get("/v1/agents/a").json()["state"] == "asleep"
        woken = ask(http, "a", QUESTION)
        assert missing(woken) == 1, "one token, whose logits are wanted"
        assert http.get("/health").json()["engine"]["disk_tokens"] == woken["usage"]["prompt_tokens"] - 1
        assert f'dormouse_runtime_info{{runtime="{second}"}} 1' in http.get("/metrics").text
        follow_up = ask(http, "a", QUESTION, said(woken), "And in 1713?")
        assert missing(follow_up) < missing(before) / 10
    found = round(distance(woken, cold), 4)
    record_property(f"logprob_distance_{first}_{second}", found)
    assert found < TOLERANCE


@BOTH_WAYS
def test_an_exported_agent_goes_on_in_a_server_of_the_other_runtime(
    tmp_path: Path, first: RuntimeName, second: RuntimeName
) -> None:
    with strict_server(tmp_path / "here", *FLAGS, runtime=first) as server, server.client() as http:
        before = ask(http, "a", QUESTION)
        file = http.get("/v1/agents/a/export").raise_for_status().content
    with strict_server(tmp_path / "there", *FLAGS, runtime=second) as server, server.client() as http:
        taken = http.post("/v1/agents/import", params={"name": "b"}, content=file)
        assert taken.status_code == 201, taken.text
        known = taken.json()["tokens"]
        assert taken.json()["durable_tokens"] >= known - 1, "all but the last sampled token"
        answer = ask(http, "b", QUESTION, said(before), "And in 1713?")
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= known - 1


def test_an_agent_of_another_format_is_refused_on_mlx(tmp_path: Path) -> None:
    """Blocks of other shapes: the message names both sides."""
    with strict_server(tmp_path / "here", *FLAGS, runtime="torch") as server, server.client() as http:
        ask(http, "a", QUESTION)
        file = http.get("/v1/agents/a/export").raise_for_status().content
    flags = (*FLAGS, "--block-size", "64")
    with strict_server(tmp_path / "there", *flags, runtime="mlx") as server, server.client() as http:
        refused = http.post("/v1/agents/import", content=file)
        assert refused.status_code == 409, refused.text
        said = refused.json()["error"]["message"]
        assert "128" in said
        assert "64" in said
        assert http.get("/v1/agents").json()["data"] == []
