"""Anthropic's messages over HTTP: shapes, event order, usage, errors, and the real SDK."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import pytest
from tests.api.conftest import Service

LONG = "the quick brown fox jumps over the lazy dog and then over the next one, " * 4

RESULT = {"type": "tool_result", "tool_use_id": "t"}
DOCUMENT = {"type": "document", "source": "x"}


def ask(service: Service, text: str = "hello", **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": text}]
    body = {"model": "fake", "messages": messages, "max_tokens": 8, "temperature": 0} | fields
    return service.http.post("/v1/messages?beta=true", json=body)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    found = []
    for frame in answer.text.split("\n\n"):
        if frame:
            name, data = frame.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}", "clients drop frames without a name"
            found.append(event)
    return found


def prompt_tokens(usage: dict[str, Any]) -> int:
    return sum(
        usage[name] for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    )


def test_a_reply_has_the_dialects_shape(service: Service) -> None:
    body = ask(service).json()
    assert body["id"].startswith("msg_")
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "fake")
    assert [block["type"] for block in body["content"]] == ["text"]
    assert (body["stop_reason"], body["stop_sequence"]) == ("max_tokens", None)
    assert body["usage"]["output_tokens"] == 8


def test_the_events_of_a_stream_come_in_the_order_that_clients_insist_on(service: Service) -> None:
    whole = ask(service).json()
    stream = events(ask(service, stream=True))
    kinds = [event["type"] for event in stream]
    deltas = kinds.count("content_block_delta")
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert deltas > 3, "pieces leave as they are sampled"
    text = "".join(e["delta"]["text"] for e in stream if e["type"] == "content_block_delta")
    assert text == whole["content"][0]["text"]
    assert stream[0]["message"]["stop_reason"] is None
    assert stream[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert stream[-2]["usage"]["output_tokens"] == 8


def test_usage_tells_what_was_found_already_at_the_start(service: Service) -> None:
    first = events(ask(service, LONG, stream=True))
    again = events(ask(service, LONG, stream=True))
    before, after = first[0]["message"]["usage"], again[0]["message"]["usage"]
    assert before["cache_read_input_tokens"] == 0
    assert before["cache_creation_input_tokens"] > 0
    assert after["cache_read_input_tokens"] > 200
    assert prompt_tokens(before) == prompt_tokens(after) == prompt_tokens(again[-2]["usage"])


def test_a_stop_sequence_is_named(service: Service) -> None:
    text = ask(service, max_tokens=20).json()["content"][0]["text"]
    body = ask(service, max_tokens=20, stop_sequences=[text[5:8]]).json()
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", text[5:8])
    assert body["content"][0]["text"] == text[: text.index(text[5:8])]


def test_no_tokens_warm_the_cache(service: Service) -> None:
    body = ask(service, LONG, max_tokens=0).json()
    assert (body["content"], body["usage"]["output_tokens"]) == ([], 0)
    assert ask(service, LONG).json()["usage"]["cache_read_input_tokens"] > 200


def test_counting_is_exact(service: Service) -> None:
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    counted = service.http.post(
        "/v1/messages/count_tokens",
        json={"model": "fake", "system": system, "messages": [{"role": "user", "content": LONG}]},
    ).json()
    assert counted == {"input_tokens": prompt_tokens(ask(service, LONG, system=system).json()["usage"])}


def test_what_real_clients_send_is_accepted(service: Service) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "another server's"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "a"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "b"}]},
                {"type": "text", "text": "and?"},
            ],
        },
        {"role": "system", "content": "a reminder"},
        {"role": "user", "content": "go on"},
        {"role": "user", "content": "please"},
    ]
    answer = ask(
        service,
        messages=messages,
        system=[{"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.abc; cch=12345;"}],
        tools=[
            {"name": "Read", "description": "d", "input_schema": {"type": "object"}, "defer_loading": False},
            {"type": "web_search_20250305", "name": "web_search"},
        ],
        thinking={"type": "adaptive"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "high"},
        metadata={"user_id": json.dumps({"session_id": "s-1"})},
        never_heard_of={"a": 1},
    )
    assert answer.status_code == 200, answer.text


def test_the_attribution_line_never_reaches_the_model(service: Service) -> None:
    def cached(line: str) -> int:
        system = [{"type": "text", "text": line}, {"type": "text", "text": LONG}]
        usage: dict[str, Any] = ask(service, "hello", system=system).json()["usage"]
        return int(usage["cache_read_input_tokens"])

    assert cached("x-anthropic-billing-header: cc_version=2.1.197.abc; cch=11111;") == 0
    assert cached("x-anthropic-billing-header: cc_version=2.1.197.def; cch=22222;") > 200


def test_sessions_name_agents_and_side_requests_keep_away(service: Service) -> None:
    tools = [{"name": "Read", "input_schema": {"type": "object"}}]
    headers = {"x-claude-code-session-id": "s-1"}
    body = {"model": "fake", "max_tokens": 4, "messages": [{"role": "user", "content": LONG}]}
    service.http.post("/v1/messages", json=body | {"tools": tools}, headers=headers)
    service.http.post("/v1/messages", json=body, headers=headers)
    sub = headers | {"x-claude-code-agent-id": "a-1"}
    service.http.post("/v1/messages", json=body | {"tools": tools}, headers=sub)
    names = {agent["id"] for agent in service.http.get("/v1/agents").json()["data"]}
    assert names == {"claude-code/s-1", "claude-code/s-1/side", "claude-code/s-1/a-1"}


def test_a_miss_is_explained_to_who_asks(service: Service) -> None:
    first = ask(service, LONG).json()

    def why(**fields: Any) -> Any:
        body = ask(service, diagnostics={"previous_message_id": first["id"]}, **fields).json()
        reason = body["diagnostics"]["cache_miss_reason"]
        return reason and reason["type"]

    follow_up = [
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": "and then?"},
    ]
    assert why(messages=follow_up) is None
    assert why(messages=follow_up, system="new") == "system_changed"
    tools = [{"name": "Read", "input_schema": {"type": "object"}}]
    assert why(messages=follow_up, tools=tools) == "tools_changed"
    assert why(text="something else") == "messages_changed"
    body = ask(service, diagnostics={"previous_message_id": "msg_nobody"}).json()
    assert body["diagnostics"]["cache_miss_reason"]["type"] == "previous_message_not_found"


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"model": "other"}, 404, "not_found_error"),
        ({"messages": []}, 400, "invalid_request_error"),
        ({"max_tokens": -1}, 400, "invalid_request_error"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error"),
        (
            {"messages": [{"role": "user", "content": [RESULT | {"content": 5}]}]},
            400,
            "invalid_request_error",
        ),
        (
            {"messages": [{"role": "user", "content": [RESULT | {"content": ["a"]}]}]},
            400,
            "invalid_request_error",
        ),
        ({"messages": [{"role": "user", "content": [DOCUMENT]}]}, 400, "invalid_request_error"),
        ({"text": "x" * 90_000}, 400, "invalid_request_error"),
        ({"text": "x" * 200_000}, 413, "request_too_large"),
    ],
)
def test_errors_have_the_dialects_envelope(
    service: Service, fields: dict[str, Any], status: int, kind: str
) -> None:
    answer = ask(service, **fields)
    assert answer.status_code == status
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert body["error"]["message"]


def test_a_prompt_that_is_too_long_says_so_in_the_words_that_clients_know(service: Service) -> None:
    message = ask(service, "x" * 90_000).json()["error"]["message"]
    assert "prompt is too long: " in message
    assert " tokens > " in message


def test_the_sdk_works(service: Service) -> None:
    with anthropic.Anthropic(base_url=service.url, max_retries=0, api_key="k") as client:
        messages: Any = [{"role": "user", "content": "hello"}]
        whole = client.messages.create(model="fake", max_tokens=8, messages=messages)
        with client.messages.stream(model="fake", max_tokens=8, messages=messages) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert whole.content[0].type == "text"
        assert final.content[0].type == "text"
        assert text == final.content[0].text
        assert final.usage.output_tokens == 8
        counted = client.messages.count_tokens(model="fake", messages=messages)
        assert counted.input_tokens == prompt_tokens(whole.usage.model_dump())
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="other", max_tokens=8, messages=messages)
        assert [model.id for model in client.models.list()] == ["fake"]
