"""Conversations that the server keeps: turns, their past after a fork, a rollback and a restart, and why."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from tests.api.conftest import Service

LONG = "the quick brown fox jumps over the lazy dog and then over the next one, " * 2


def make(service: Service, name: str = "me", **fields: Any) -> None:
    settings = {"temperature": 0, "max_tokens": 8}
    body = {"name": name, "settings": settings} | fields
    assert service.http.post("/v1/agents", json=body).status_code == 201


def say(service: Service, text: str, name: str = "me", **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}]} | fields
    return service.http.post(f"/v1/agents/{name}/messages", json=body)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def test_only_the_new_turn_travels(service: Service) -> None:
    make(service, system="be brief")
    first = text_of(say(service, LONG))
    second = say(service, "and then?")
    whole = service.chat(
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": LONG},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "and then?"},
        ]
    )
    assert text_of(second) == text_of(whole)
    usage = second.json()["usage"]
    assert usage["prompt_tokens"] == whole.json()["usage"]["prompt_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > len(LONG)
    said = service.http.get("/v1/agents/me/messages").json()["data"]
    assert [message["role"] for message in said] == ["user", "assistant"] * 2
    assert said[1]["content"] == first


def test_a_stream_is_a_chat_stream(service: Service) -> None:
    make(service)
    answer = say(service, "hello", stream=True, stream_options={"include_usage": True})
    frames = [frame.removeprefix("data: ") for frame in answer.text.split("\n\n") if frame]
    assert frames[-1] == "[DONE]"
    chunks = [json.loads(frame) for frame in frames[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    said = service.http.get("/v1/agents/me/messages").json()["data"]
    assert said[-1]["content"] == text


def test_forks_and_rollbacks_take_their_words_along(service: Service) -> None:
    make(service)
    say(service, LONG)
    assert service.http.post("/v1/agents/me/checkpoints", json={"name": "early"}).status_code == 201
    assert service.http.post("/v1/agents/me/fork", json={"name": "other"}).status_code == 201
    mine = text_of(say(service, "left"))
    assert text_of(say(service, "left", "other")) == mine
    text_of(say(service, "right", "other"))
    assert len(service.http.get("/v1/agents/me/messages").json()["data"]) == 4
    assert service.http.post("/v1/agents/me/rollback", json={"checkpoint": "early"}).status_code == 200
    assert len(service.http.get("/v1/agents/me/messages").json()["data"]) == 2
    assert text_of(say(service, "left")) == mine


def test_turns_of_one_agent_come_one_after_the_other(service: Service) -> None:
    make(service)
    answers: list[httpx.Response] = []
    turns = [
        threading.Thread(target=lambda text=text: answers.append(say(service, text)))
        for text in ("one", "two")
    ]
    for turn in turns:
        turn.start()
    for turn in turns:
        turn.join(30)
    assert [answer.status_code for answer in answers] == [200, 200]
    said = service.http.get("/v1/agents/me/messages").json()["data"]
    assert [message["role"] for message in said] == ["user", "assistant"] * 2
    assert {said[0]["content"], said[2]["content"]} == {"one", "two"}


def test_a_turn_that_fails_leaves_the_agent_as_it_was(service: Service) -> None:
    make(service)
    text_of(say(service, "hello"))
    assert say(service, "x" * 50_000).status_code == 400
    assert say(service, "x", n=2).json()["error"]["param"] == "n"
    assert len(service.http.get("/v1/agents/me/messages").json()["data"]) == 2
    text_of(say(service, "go on"))


def test_a_first_turn_that_is_cut_leaves_an_agent_that_can_be_spoken_to(service: Service) -> None:
    make(service, settings={"temperature": 0, "max_tokens": 500})
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
    with service.http.stream("POST", "/v1/agents/me/messages", json=body) as answer:
        next(answer.iter_lines())
    # The server may notice late: the turn is kept whole or not at all.
    assert len(service.http.get("/v1/agents/me/messages").json()["data"]) in (0, 2)
    text_of(say(service, "hello again", max_tokens=4))


def test_a_deleted_agents_words_do_not_come_back(service: Service) -> None:
    make(service)
    turn = service.http.build_request(
        "POST", "/v1/agents/me/messages", json={"messages": [{"role": "user", "content": "secret"}]}
    )
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(service.http.send, turn)
        service.http.delete("/v1/agents/me")
        said.result(30)
    service.http.delete("/v1/agents/me")
    make(service)
    assert service.http.get("/v1/agents/me/messages").json()["data"] == []


def test_what_it_was_made_with_must_fit(service: Service) -> None:
    make(service, settings={"temperature": 9})
    answer = say(service, "hello")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "settings")


def test_agents_of_other_clients_are_not_spoken_for(service: Service) -> None:
    assert say(service, "hello", "nobody").status_code == 404
    service.chat("hello", prompt_cache_key="theirs")
    refused = say(service, "hello", "theirs")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "agent")


def test_why_says_where_a_prompt_left_the_agents_history(service: Service) -> None:
    assert service.http.get("/v1/agents/nobody/why").status_code == 404
    service.chat(LONG + "left", prompt_cache_key="me")
    first = service.http.get("/v1/agents/me/why").json()["decision"]
    assert (first["matched_tokens"], first["diverged"]) == (0, None)
    service.chat(LONG + "right", prompt_cache_key="me")
    why = service.http.get("/v1/agents/me/why").json()["decision"]
    assert why["history_tokens"] > len(LONG)
    assert why["diverged"]["at_token"] == len("user: " + LONG)
    assert why["diverged"]["remembered"].startswith("left")
    assert why["diverged"]["received"].startswith("right")
    assert why["computed_tokens"] == why["prompt_tokens"] - why["matched_tokens"]
    assert why["first_token_s"] > 0
    service.http.delete("/v1/agents/me")
    service.chat("new", prompt_cache_key="me")
    assert service.http.get("/v1/agents/me/why").json()["decision"]["history_tokens"] == 0
