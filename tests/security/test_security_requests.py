"""Requests that nobody means: every parser of every dialect answers 4xx or the reply, soon, and serves on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.api.conftest import Service, serving
from tests.security.mutations import STRANGE, damaged, fuzzing, twisted

from dormouse.runtimes.fake import FakeRuntime

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SPOKEN = [
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    {"role": "assistant", "content": "yes"},
]
FUNCTION = {"name": "weather", "description": "d", "parameters": SCHEMA}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
SAMPLING = {"temperature": 0.5, "top_p": 0.9, "seed": 7}

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "fake",
        "max_tokens": 2,
        **SAMPLING,
        "stop": ["x"],
        "n": 1,
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": 1.0},
        "presence_penalty": 0.1,
        "stream_options": {"include_usage": True},
        "messages": [
            *SPOKEN,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1"},
            {"role": "user", "content": "and?"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [{"name": "weather"}]},
        },
        "response_format": {"type": "text"},
        "chat_template_kwargs": {"a": 1},
        "metadata": {"a": "b"},
        "prompt_cache_key": "k",
    },
    "/v1/completions": {
        "model": "fake",
        "prompt": [[1, 2, 3], [4]],
        "max_tokens": 2,
        "logprobs": 1,
        **SAMPLING,
    },
    "/v1/messages": {
        "model": "fake",
        "max_tokens": 2,
        "temperature": 0.5,
        "stop_sequences": ["x"],
        "system": [{"type": "text", "text": "be brief"}],
        "messages": [
            {"role": "user", "content": [{"type": "document", "source": {"type": "text", "data": "d"}}]},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "x"}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text"}]}],
            },
        ],
        "tools": [{"name": "weather", "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto"},
        "metadata": {"user_id": '{"session_id": "s"}'},
        "diagnostics": {"previous_message_id": "m"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"format": {"type": "text"}},
    },
    "/v1/responses": {
        "model": "fake",
        "max_output_tokens": 2,
        "instructions": "be brief",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}", "namespace": "n"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]},
            {"type": "item_reference", "id": "i"},
        ],
        "tools": [
            {"type": "function", "name": "weather", "parameters": SCHEMA},
            {"type": "namespace", "name": "n", "tools": [{"type": "custom", "name": "free"}]},
        ],
        "tool_choice": {"type": "function", "name": "weather"},
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
        "metadata": {"a": "b"},
        "client_metadata": {"thread_id": "t"},
    },
    "/v1/agents": {"name": "new", "system": "s", "tools": [FUNCTION], "settings": {"temperature": 0.5}},
    "/v1/agents/a/messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
    "/v1/agents/a/fork": {"name": "b", "checkpoint": "t"},
    "/v1/agents/a/checkpoints": {"name": "t"},
    "/v1/agents/a/rollback": {"checkpoint": "t"},
}
BODIES["/v1/messages/count_tokens"] = BODIES["/v1/messages"]
BODIES["/v1/responses/input_tokens"] = BODIES["/v1/responses"]
JSON = {"content-type": "application/json"}
MOST_TOKENS = {"/v1/responses": "max_output_tokens", "/v1/agents": "quota_bytes"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("requests"), FakeRuntime(256, context_length=1024)) as service:
        service.chat(prompt_cache_key="a").raise_for_status()
        yield service


def check_answer(service: Service, path: str, body: bytes | str) -> int:
    """Send a raw body; what comes is no error of the server's, and it is JSON in the dialect's envelope."""
    answer = service.http.post(path, content=body, headers=JSON)
    assert answer.status_code < 500, (path, body[:2000], answer.text[:2000])
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert isinstance(error["message"], str)
        assert error["message"], answer.text
    return answer.status_code


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", BODIES)
def test_fuzz_bodies(service: Service, path: str) -> None:
    """Any value may stand anywhere."""

    @fuzzing(25)
    @given(body=twisted(BODIES[path]))
    def check(body: Any) -> None:
        if isinstance(body, dict) and "model" in body:
            name = MOST_TOKENS.get(path, "max_tokens")
            body[name] = min(body[name], 4) if type(body.get(name)) is int else 2
        check_answer(service, path, json.dumps(body))

    check()
    assert service.chat().status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/agents/a/messages"]
)
def test_fuzz_raw_json(service: Service, path: str) -> None:
    """Bodies that are no JSON any more, or another one."""

    @fuzzing(20)
    @given(body=damaged(json.dumps(BODIES[path]).encode()))
    def check(body: bytes) -> None:
        check_answer(service, path, body)

    check()


DEEP = 100_000
RAW: dict[str, bytes] = {
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep and unclosed": b"[" * 99_000,
    "nan": b'{"model": "fake", "temperature": NaN}',
    "infinity": b'{"model": "fake", "temperature": -Infinity}',
    "too large for a float": b'{"model": "fake", "metadata": {"a": 1e999}, "max_tokens": 2, "prompt": "x",'
    b' "input": "x", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    "too many digits": b'{"model": "fake", "seed": ' + b"9" * 50_000 + b"}",
    "lone surrogate": b'{"model": "\\ud800", "input": "\\ud800", "messages": [{"role": "user"}]}',
    "raw surrogate": b'{"model": "\xed\xa0\x80"}',
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": "fake"}'.encode("utf-16"),
    "control character": b'{"model": "a\x00b\nc"}',
    "trailing": b'{"model": "fake"} {"model": "fake"}',
    "empty": b" ",
    "null": b"null",
    "number": b"1",
    "text": b'"x"',
    "list": b"[]",
}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("path", BODIES)
def test_what_is_no_body_is_refused(service: Service, path: str, name: str) -> None:
    assert 400 <= check_answer(service, path, RAW[name]) < 500


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_never_reach_the_sampler(service: Service, field: str, value: str) -> None:
    body = f'{{"model": "fake", "prompt": "x", "max_tokens": 1, "{field}": {value}}}'
    assert check_answer(service, "/v1/completions", body) == 400
    made = f'{{"name": "n-{field}-{value}", "settings": {{"{field}": {value}}}}}'
    assert check_answer(service, "/v1/agents", made) == 400


def test_the_last_of_two_equal_keys_counts(service: Service) -> None:
    """Nobody before the reader looks at a body, so nobody can be told another one."""
    body = '{"model": "nobody", "model": "fake", "prompt": "x", "max_tokens": 1}'
    assert check_answer(service, "/v1/completions", body) == 200


def test_a_byte_order_mark_is_passed_over(service: Service) -> None:
    body = b'\xef\xbb\xbf{"model": "fake", "prompt": "x", "max_tokens": 1}'
    assert check_answer(service, "/v1/completions", body) == 200


CROWDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tools and as many allowed": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "x"}],
            "tools": [{"type": "function", "function": {"name": f"{n}"}} for n in range(900)],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [{"name": "899"}] * 2500}},
        },
    ),
    "calls in a row": ("/v1/responses", {"input": [{"type": "function_call"}] * 4000}),
    "messages": ("/v1/messages", {"messages": [{"role": "user", "content": ""}] * 2500, "max_tokens": 1}),
    "stop strings": ("/v1/messages", {"messages": SPOKEN, "max_tokens": 1, "stop_sequences": ["x"] * 1000}),
    "a long stop string": ("/v1/completions", {"prompt": "x", "stop": "x" * 1000}),
    "biases": ("/v1/completions", {"prompt": "x", "logit_bias": {str(n): 1 for n in range(5000)}}),
}


@pytest.mark.parametrize("name", CROWDS)
def test_a_crowd_within_one_body_is_no_crowd(service: Service, name: str) -> None:
    path, body = CROWDS[name]
    check_answer(service, path, json.dumps({"model": "fake"} | body))


def test_work_grows_with_a_body_and_not_with_its_square() -> None:
    """Counted, not timed: names were once looked for one by one, texts joined one by one."""
    from dormouse.api.chat_schema import tool_choice
    from dormouse.api.responses_schema import ResponsesBody

    class Name(str):
        num_compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Name.num_compared += 1
            return str.__eq__(self, other) is True

    many = 3000
    wanted = {"type": "allowed_tools", "allowed_tools": {"tools": [{"name": str(n)} for n in range(many)]}}
    assert len(tool_choice(wanted, [Name(n) for n in range(many)], parallel=True).names) == many
    assert Name.num_compared < 10 * many
    items = [{"type": "function_call", "name": "f", "call_id": str(n)} for n in range(many)]
    body = ResponsesBody(model="fake", input=items)
    (message,) = body.conversation_after((), body.toolbox()).messages
    assert [call.id for call in message.calls] == [str(n) for n in range(many)]


def test_arguments_nested_as_none_are_stay_text(service: Service) -> None:
    arguments = '{"a":' * 900 + "1" + "}" * 900
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    body = {"model": "fake", "messages": messages, "max_tokens": 1}
    assert check_answer(service, "/v1/chat/completions", json.dumps(body)) in (200, 400)


@pytest.mark.parametrize("strange", STRANGE, ids=lambda value: repr(value)[:20])
def test_strange_names_of_agents(service: Service, strange: Any) -> None:
    check_answer(service, "/v1/agents", json.dumps({"name": strange}))
    headers = JSON | {"x-agent-id": str(strange)[:200].encode("utf-8", "replace").decode("latin-1")}
    body = {"model": "fake", "prompt": "x", "max_tokens": 1}
    try:
        answer = service.http.post("/v1/completions", json=body, headers=headers)
    except (httpx.LocalProtocolError, ValueError):
        return  # no header can hold it
    assert answer.status_code < 500


@pytest.mark.parametrize(
    "query",
    [
        "limit=99999999999999999999",
        "after=" + "W1tb" * 9000,
        "after=AAAA",
        "state=%00",
        "prefix=%ff%fe",
        "after=bnVsbA==",
    ],
)
def test_strange_cursors(service: Service, query: str) -> None:
    answer = service.http.get(f"/v1/agents?{query}")
    assert answer.status_code < 500, answer.text


@pytest.mark.parametrize("kind", ["agent", "transcript"])
@pytest.mark.parametrize(
    "document",
    [
        *(
            b"[]",
            b"7",
            b"null",
            b'"x"',
            b"{}",
            b'{"messages": 7, "tools": 7}',
            b'{"messages": [7], "tools": [7]}',
        ),
        b'{"messages": [{"role": [], "content": {}}], "tools": [{"type": []}], "settings": {"n": {}}}',
        b'{"messages": [{"role": "user", "content": "x", "odd": 1e999}], "settings": {"odd": 1e999}}',
        b'{"model": [], "system": [], "settings": {"temperature": NaN, "model": "nobody", "messages": []}}',
    ],
)
def test_documents_that_came_in_an_agents_file(service: Service, kind: str, document: bytes) -> None:
    """An imported agent brings its own transcript and settings, and nobody has looked into them."""
    name = f"odd-{kind}-{abs(hash(document))}"
    service.http.post("/v1/agents", json={"name": name}).raise_for_status()
    service.store.notebook.put("default", kind, name, document)
    for method, action, body in (
        ("GET", "/messages", None),
        ("POST", "/messages", BODIES["/v1/agents/a/messages"]),
        ("GET", "", None),
        ("POST", "/fork", {"name": f"{name}-fork"}),
        ("DELETE", "", None),
    ):
        answer = service.http.request(method, f"/v1/agents/{name}{action}", json=body)
        assert answer.status_code < 500, (method, action, answer.text)


# -- below HTTP: headers, lengths, encodings ---------------------------------------------------------


def raw(service: Service, sent: bytes, *, timeout_s: float = 10.0) -> bytes:
    """What is answered to these bytes, up to the end of the connection or the time-out."""
    host, port = service.url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        try:
            connection.sendall(sent)
            while chunk := connection.recv(65536):
                received += chunk
                if b"\r\n\r\n" in received:
                    break
        except (ConnectionError, TimeoutError):
            pass
    return received


def test_headers_are_bounded_in_size_and_number(service: Service) -> None:
    one = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-a: " + b"a" * 1_000_000 + b"\r\n\r\n"
    many = b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 100_000 + b"\r\n"
    line = b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"
    for sent in (one, many, line):
        answer = raw(service, sent)
        assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431", b""), answer[:200]
    assert service.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 5\r\ntransfer-encoding: chunked",
        b"content-length: -1",
        b"content-length: 1e3",
        b"content-length: 5\r\ncontent-length: 6",
        b"content-length: " + b"9" * 30,
        b"transfer-encoding: gzip",
    ],
)
def test_lengths_that_contradict_themselves(service: Service, head: bytes) -> None:
    sent = (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        + head
        + b"\r\n\r\n{}"
    )
    assert raw(service, sent, timeout_s=3)[:10] in (b"HTTP/1.1 4", b""), head


def test_a_body_without_length_is_bounded_as_any(service: Service) -> None:
    """The limit of this server is 100 000 bytes; what comes in pieces is counted."""

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 10_000

    answer = service.http.post("/v1/completions", content=pieces(), headers=JSON)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, gzip"])
def test_compressed_bodies_are_refused_and_not_unpacked(service: Service, coding: str) -> None:
    answer = service.http.post(
        "/v1/completions", content=b"\x1f\x8b" + bytes(64), headers=JSON | {"content-encoding": coding}
    )
    assert answer.status_code == 415
    assert "compressed" in answer.json()["error"]["message"]


def test_fuzz_paths(service: Service) -> None:
    """Whatever stands in a path: traversal, half escapes, slashes, controls."""
    parts = st.sampled_from(
        ["..", "%2e%2e", "%00", "%ff", "%", "a", "", "messages", "export", "%2f", "checkpoints", "\u2028"]
    )

    @fuzzing(40)
    @given(
        path=st.lists(parts, max_size=6).map("/".join),
        method=st.sampled_from(["GET", "DELETE", "POST", "PATCH"]),
    )
    def check(path: str, method: str) -> None:
        sent = f"{method} /v1/agents/{path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
        status = raw(service, sent)[9:12]
        assert not status.startswith(b"5"), (method, path)

    check()


def test_the_event_loop_answers_beside_a_large_body(service: Service) -> None:
    """A body at the limit holds up others for a moment; far more would mean work of the square."""
    body = json.dumps({"model": "fake", "messages": [{"role": "user"}] * 5000, "max_tokens": 1})
    began = time.monotonic()
    check_answer(service, "/v1/chat/completions", body)
    assert time.monotonic() - began < 20
