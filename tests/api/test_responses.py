"""OpenAI's Responses over HTTP: items, event order, a past that the server keeps, and the real SDK."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from tests.api.conftest import Service

from dormouse.api.answer import Delta
from dormouse.api.responses_schema import ResponsesBody
from dormouse.api.responses_stream import ResponseStream
from dormouse.domain.conversation import Called, ToolCall
from dormouse.runtimes.fake import FakeRuntime

LONG = "the quick brown fox jumps over the lazy dog and then over the next one, " * 4


def ask(service: Service, given: Any = "hello", **fields: Any) -> httpx.Response:
    body = {"model": "fake", "input": given, "max_output_tokens": 8, "temperature": 0} | fields
    return service.http.post("/v1/responses", json=body)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    frames = [frame.split("\n") for frame in answer.text.split("\n\n") if frame]
    found = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name for name, _ in frames] == [f"event: {event['type']}" for event in found]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def text_of(response: dict[str, Any]) -> str:
    (message,) = response["output"]
    text: str = message["content"][0]["text"]
    return text


def test_a_response_has_the_dialects_shape(service: Service) -> None:
    body = ask(service).json()
    assert body["id"].startswith("resp_")
    assert (body["object"], body["status"]) == ("response", "incomplete")
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["id"].startswith("msg_")
    assert body["output"][0]["role"] == "assistant"
    usage = body["usage"]
    assert usage["output_tokens"] == 8
    assert usage["total_tokens"] == usage["input_tokens"] + 8


def test_the_life_cycle_of_a_stream(service: Service) -> None:
    whole = ask(service).json()
    stream = events(ask(service, stream=True))
    kinds = [event["type"].removeprefix("response.") for event in stream]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    assert deltas > 3, "pieces leave as they are sampled"
    text = "".join(event["delta"] for event in stream if event["type"] == "response.output_text.delta")
    last = stream[-1]["response"]
    assert text == text_of(whole) == text_of(last) == stream[-4]["text"]
    assert stream[-2]["item"] == last["output"][0]
    assert len({event["response"]["id"] for event in stream if "response" in event}) == 1


def test_the_server_keeps_the_past(service: Service) -> None:
    first = ask(service, LONG).json()
    second = ask(service, "and then?", previous_response_id=first["id"]).json()
    replayed = [
        {"type": "message", "role": "user", "content": LONG},
        *first["output"],
        {"role": "user", "content": "and then?"},
    ]
    third = ask(service, replayed).json()
    assert text_of(second) == text_of(third)
    assert second["usage"]["input_tokens"] == third["usage"]["input_tokens"]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > 250
    assert ask(service, "go on", previous_response_id=second["id"]).status_code == 200


def test_stored_responses_can_be_read_and_deleted(service: Service) -> None:
    body = ask(service, [{"role": "user", "content": "hello"}]).json()
    path = f"/v1/responses/{body['id']}"
    assert service.http.get(path).json() == body
    items = service.http.get(f"{path}/input_items").json()
    assert [item["content"] for item in items["data"]] == ["hello"]
    assert service.http.post(f"{path}/cancel").json() == body
    assert service.http.delete(path).json()["deleted"] is True
    for answer in (
        service.http.get(path),
        service.http.delete(path),
        ask(service, previous_response_id=body["id"]),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "previous_response_not_found"


def test_what_is_not_to_be_stored_is_not(service: Service) -> None:
    body = ask(service, store=False).json()
    assert service.http.get(f"/v1/responses/{body['id']}").status_code == 404


@pytest.mark.parametrize("runtime", [lambda num_pages: FakeRuntime(8 * num_pages)], indirect=True)
def test_what_codex_sends_is_accepted(service: Service) -> None:
    answer = ask(
        service,
        [
            {
                "type": "message",
                "id": "msg_1",
                "role": "developer",
                "content": [{"type": "input_text", "text": "rules"}, {"type": "input_text", "text": "more"}],
            },
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "more"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "context"}]},
            {"type": "reasoning", "summary": [], "encrypted_content": "x"},
            {"type": "function_call", "call_id": "call_1", "name": "shell", "arguments": "{}"},
            {
                "type": "function_call_output",
                "call_id": "call_1",
                "output": [{"type": "input_text", "text": "o"}],
            },
            {"type": "custom_tool_call", "call_id": "call_2", "name": "apply_patch", "input": "*** Begin"},
            {"type": "custom_tool_call_output", "call_id": "call_2", "output": "done"},
            {"type": "web_search_call", "id": "ws_1"},
            {"type": "message", "role": "user", "content": "go on"},
        ],
        stream=True,
        store=False,
        instructions="be brief",
        include=["reasoning.encrypted_content"],
        prompt_cache_key="thread",
        parallel_tool_calls=True,
        tool_choice="auto",
        text={"verbosity": "low"},
        reasoning={"summary": "auto"},
        client_metadata={"thread_id": "thread", "session_id": "thread", "x-codex-turn-metadata": "{}"},
        tools=[
            {"type": "function", "name": "shell", "parameters": {"type": "object"}, "strict": False},
            {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
            {
                "type": "namespace",
                "name": "mcp",
                "description": "d",
                "tools": [{"type": "function", "name": "look"}],
            },
            {"type": "web_search", "external_web_access": False},
        ],
    )
    assert events(answer)[-1]["type"] == "response.incomplete"


def test_tools_of_one_name_in_two_namespaces_are_told_apart() -> None:
    inner = [{"type": "function", "name": "search"}]
    tools = [{"type": "namespace", "name": name, "tools": inner} for name in ("a", "b")]
    body = ResponsesBody(model="fake", input="x", tools=tools)
    toolbox = body.toolbox()
    assert [tool.name for tool in toolbox.tools] == ["a__search", "b__search"]
    stream = ResponseStream(body, toolbox)
    events = list(stream.delta(Delta((Called(ToolCall("call_1", "b__search", "{}")),))))
    assert (events[-1]["item"]["namespace"], events[-1]["item"]["name"]) == ("b", "search")


def test_a_context_that_is_too_long_fails_in_the_stream(service: Service) -> None:
    last = events(ask(service, "x" * 90_000, stream=True))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == "context_length_exceeded"
    refused = ask(service, "x" * 90_000)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_input_tokens_are_counted(service: Service) -> None:
    counted = service.http.post("/v1/responses/input_tokens", json={"model": "fake", "input": LONG}).json()
    assert counted["input_tokens"] == ask(service, LONG).json()["usage"]["input_tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"given": []}, "input"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"given": [{"role": "alien", "content": "x"}]}, "input.0.role"),
        ({"given": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.json_schema.schema"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": "x"}]}, "tools"),
        ({"tool_choice": {"type": "allowed_tools", "tools": ["x"]}}, "tool_choice"),
        ({"given": [{"type": "reasoning", "summary": "x"}]}, "input.0"),
        ({"given": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
        ({"truncation": "auto"}, "truncation"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    service: Service, fields: dict[str, Any], param: str
) -> None:
    answer = ask(service, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_sdk_works(service: Service) -> None:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="k", max_retries=0) as client:
        whole = client.responses.create(model="fake", input="hello", max_output_tokens=8)
        with client.responses.create(
            model="fake", input="more", previous_response_id=whole.id, max_output_tokens=8, stream=True
        ) as stream:
            kinds = [event.type for event in stream]
        assert kinds[-1] == "response.incomplete"
        assert client.responses.retrieve(whole.id).output_text == whole.output_text
        client.responses.delete(whole.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(whole.id)
