"""Chat completions over HTTP: shapes, streams, reuse, errors."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from tests.api.conftest import Service


def events(text: str) -> list[Any]:
    frames = [frame for frame in text.split("\n\n") if frame]
    assert all(frame.startswith(("data: ", ": ping")) and "\n" not in frame for frame in frames)
    return [
        frame if frame.endswith("[DONE]") else json.loads(frame.removeprefix("data: "))
        for frame in frames
        if frame.startswith("data: ")
    ]


def test_a_reply_has_openais_shape(service: Service) -> None:
    body = service.chat().json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 8
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 8


def test_a_stream_says_the_same(service: Service) -> None:
    whole = service.chat().json()["choices"][0]["message"]["content"]
    answer = service.chat(stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = events(answer.text)
    assert frames[-1] == "data: [DONE]"
    chunks = frames[:-1]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]]
    assert "".join(deltas) == whole
    assert len(deltas) > 3, "pieces leave as they are sampled"
    assert chunks[-2]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["usage"]["completion_tokens"] == 8


def test_usage_comes_only_when_asked(service: Service) -> None:
    assert all("usage" not in f for f in events(service.chat(stream=True).text) if isinstance(f, dict))


def test_an_anonymous_prompt_is_reused(service: Service) -> None:
    first = service.chat("a question " * 5).json()["usage"]
    second = service.chat("a question " * 5).json()["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == second["prompt_tokens"] - 1


@pytest.mark.parametrize(
    ("headers", "fields", "name"),
    [
        ({"x-agent-id": "by-header"}, {"prompt_cache_key": "by-key"}, "by-header"),
        ({}, {"prompt_cache_key": "by-key"}, "by-key"),
        ({}, {}, None),
        ({"x-agent-id": "a/b c"}, {}, "a/b c"),
    ],
)
def test_who_the_agent_is(
    service: Service, headers: dict[str, str], fields: dict[str, str], name: str | None
) -> None:
    service.http.headers.update(headers)
    service.chat(**fields)
    listed = [agent["id"] for agent in service.http.get("/v1/agents").json()["data"]]
    assert listed == ([name] if name else [])


def test_stop_seed_and_logprobs(service: Service) -> None:
    whole = service.chat(max_tokens=20).json()["choices"][0]["message"]["content"]
    stop = whole[5:7]
    stopped = service.chat(max_tokens=20, stop=stop).json()["choices"][0]
    assert stopped["message"]["content"] == whole[: whole.index(stop)]
    assert stopped["finish_reason"] == "stop"
    seeded = [service.chat(temperature=1, seed=4).json()["choices"][0]["message"] for _ in range(2)]
    assert seeded[0] == seeded[1]
    choice = service.chat(logprobs=True, top_logprobs=2).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert len(entries) == 8
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0 for entry in entries)
    assert (
        bytes(b for entry in entries for b in entry["bytes"]).decode(errors="replace")
        == (choice["message"]["content"])
    )


def test_content_parts_and_developer_messages(service: Service) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    by_parts = service.chat(messages=[{"role": "user", "content": parts}]).json()
    assert by_parts["choices"][0]["message"] == service.chat("hello").json()["choices"][0]["message"]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert service.chat(messages=messages).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 17}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop": ["x"] * 17}, "stop.list[constrained-str]"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    service: Service, fields: dict[str, Any], param: str
) -> None:
    answer = service.chat(**fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == param.split(".")[0]
    assert param.split(".")[0] in error["message"] or error["message"]


def test_neutral_and_harmless_fields_are_accepted(service: Service) -> None:
    fields: dict[str, Any] = {
        "n": 1,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "user": "u",
        "store": True,
        "metadata": {"a": "b"},
        "functions": None,
        "logit_bias": {},
        "stop": None,
        "top_k": -1,
        "stream": None,
        "top_p": 0,
        "min_tokens": None,
        "ignore_eos": None,
        "chat_template_kwargs": None,
        "prompt_cache_key": "",
    }
    assert service.chat(**fields).status_code == 200


def test_an_unknown_model_is_404(service: Service) -> None:
    answer = service.chat(model="gpt-4")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_prompt_that_cannot_fit_says_both_numbers(service: Service) -> None:
    answer = service.chat("x" * 2000)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "2018 tokens > 1007 maximum" in error["message"]


def test_max_tokens_is_clamped_to_the_room_left(service: Service) -> None:
    usage = service.chat("x" * 980, max_tokens=100_000).json()["usage"]
    assert usage["total_tokens"] == service.served.engine.max_length


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{" * 90_000])
def test_malformed_bodies(service: Service, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = service.http.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_huge_bodies_are_413(service: Service) -> None:
    declared = service.chat("x" * 200_000)
    assert (declared.status_code, declared.json()["error"]["code"]) == (413, "request_too_large")

    def chunks() -> Any:
        for _ in range(30):
            yield b" " * 10_000

    headers = {"content-type": "application/json"}
    answer = service.http.post("/v1/chat/completions", content=chunks(), headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    assert service.chat().status_code == 200


@pytest.mark.parametrize("name", ["x" * 10_000, "tab\there", "x" * 257])
def test_bad_agent_names_are_refused(service: Service, name: str) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    answer = service.http.post("/v1/chat/completions", json=body, headers={"x-agent-id": name})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "agent")


@pytest.mark.parametrize("key", ["x" * 10_000, "tab\there", "nul\0nul", ".."])
def test_cache_keys_that_are_no_names_still_find_their_agent(service: Service, key: str) -> None:
    service.chat("hello again, at some length", prompt_cache_key=key)
    assert service.chat("hello again, at some length", prompt_cache_key=key).status_code == 200
    (agent,) = service.http.get("/v1/agents").json()["data"]
    assert len(agent["id"]) == 32


def test_half_a_character_is_refused_like_anything_else(service: Service) -> None:
    headers = {"content-type": "application/json"}
    body = b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}'
    assert service.http.post("/v1/chat/completions", content=body, headers=headers).status_code == 400


def test_bad_json_says_where(service: Service) -> None:
    headers = {"content-type": "application/json"}
    error = service.http.post("/v1/chat/completions", content=b'{"model": ', headers=headers).json()["error"]
    assert ("column" in error["message"], error["param"]) == (True, None)
    without = service.http.post("/v1/chat/completions", content=b'{"model": "fake"}').json()["error"]
    assert "content-type: application/json" in without["message"]


def test_a_header_in_utf8_names_the_agent_that_it_says(service: Service) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    service.http.post("/v1/chat/completions", json=body, headers=[(b"x-agent-id", "café".encode())])
    service.chat(prompt_cache_key="café")
    assert [agent["id"] for agent in service.http.get("/v1/agents").json()["data"]] == ["café"]


def test_unknown_routes_and_methods_have_the_envelope(service: Service) -> None:
    assert service.http.get("/v1/nothing").json()["error"]["message"] == "Not Found"
    answer = service.http.get("/v1/chat/completions")
    assert (answer.status_code, "error" in answer.json()) == (405, True)


def test_models(service: Service) -> None:
    listed = service.http.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["fake"]
    assert service.http.get("/v1/models/fake").json()["object"] == "model"
    assert service.http.get("/v1/models/other").status_code == 404


def test_openai_sdk_works(service: Service) -> None:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        messages: Any = [{"role": "user", "content": "hello"}]
        whole = client.chat.completions.create(
            model="fake", messages=messages, temperature=0, max_tokens=8, extra_headers={"X-Agent-ID": "sdk"}
        )
        with client.chat.completions.create(
            model="fake", messages=messages, temperature=0, max_tokens=8, stream=True
        ) as stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == whole.choices[0].message.content
        assert whole.usage is not None
        completion = client.completions.create(model="fake", prompt="hello", max_tokens=4, logprobs=1)
        assert completion.choices[0].logprobs is not None
        assert completion.choices[0].logprobs.tokens is not None
        assert len(completion.choices[0].logprobs.tokens) == 4
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=messages)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="fake", messages=messages, n=99)
        assert refused.value.param == "n"
        assert [model.id for model in client.models.list()] == ["fake"]


def test_completions_take_text_and_tokens(service: Service) -> None:
    def complete(prompt: Any, **fields: Any) -> Any:
        body = {"model": "fake", "prompt": prompt, "temperature": 0, "max_tokens": 6} | fields
        return service.http.post("/v1/completions", json=body)

    text = complete("hello").json()["choices"][0]["text"]
    assert complete(["hello"]).json()["choices"][0]["text"] == text
    assert complete(list(b"hello")).json()["choices"][0]["text"] == text
    assert complete([list(b"hello")]).json()["choices"][0]["text"] == text
    several = complete(["hello", "hello!"])
    assert [choice["index"] for choice in several.json()["choices"]] == [0, 1]
    assert several.json()["choices"][0]["text"] == text
    assert several.json()["usage"]["prompt_tokens"] == 11
    assert complete(["a"] * 17).json()["error"]["param"] == "prompt"
    assert complete([]).status_code == 400
    assert complete("").status_code == 400
    streamed = [f for f in events(complete("hello", stream=True).text) if isinstance(f, dict)]
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == text
    assert {chunk["object"] for chunk in streamed} == {"text_completion"}
