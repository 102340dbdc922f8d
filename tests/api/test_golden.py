"""Every event sequence of every dialect, byte by byte, beside the one that was read and found right.

The files in `golden` are what a client receives for answers by a script; ids and times are numbered. After
a change that is meant, `pytest tests/api/test_golden.py --regenerate-golden` writes them anew: read the diff.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from tests.api.conftest import Service
from tests.api.scripted import Step, called, play, said, thought, with_logprobs

from dormouse.api.answer import StopReason
from dormouse.domain.errors import ModelOutputInvalid, ShuttingDown

GOLDEN = Path(__file__).parent / "golden"
ARGUMENTS = '{"path": "a.txt", "lines": [1, 2]}'
CALLS: list[Step] = [
    called("call00001", "read_file", ARGUMENTS),
    called("call00002", "list_files", "{}"),
]


@dataclass(frozen=True)
class Scenario:
    """An answer, and whether it is streamed; `fields` go into the request."""

    steps: list[Step]
    reason: StopReason = StopReason.END
    stop: str | None = None
    stream: bool = True
    fields: tuple[tuple[str, Any], ...] = ()


SCENARIOS = {
    "text": Scenario(said("Good ", "morning.")),
    "text, not streamed": Scenario(said("Good ", "morning."), stream=False),
    "a silence before and within": Scenario([None, *said("Good "), None, *said("morning.")]),
    "nothing": Scenario([]),
    "cut at max_tokens": Scenario(said("Good "), StopReason.MAX_TOKENS),
    "cut at max_tokens, not streamed": Scenario(said("Good "), StopReason.MAX_TOKENS, stream=False),
    "the context is full": Scenario(said("Good "), StopReason.CONTEXT_FULL),
    "a stop sequence": Scenario(said("Good "), StopReason.STOP_STRING, "morn"),
    "an error at once": Scenario([ShuttingDown("the server is shutting down")]),
    "an error in the middle": Scenario([*said("Good "), ModelOutputInvalid()]),
}
CHAT_SCENARIOS = SCENARIOS | {
    "reasoning, then text": Scenario([*thought("It is ", "early."), *said("Good morning.")]),
    "two calls": Scenario([*said("I look."), *CALLS], StopReason.CALLS),
    "two calls, not streamed": Scenario([*said("I look."), *CALLS], StopReason.CALLS, stream=False),
    "reasoning, a call, and text": Scenario([*thought("Hm."), CALLS[0], *said("Done.")], StopReason.CALLS),
    "reasoning, then a call, not streamed": Scenario(
        [*thought("Hm."), CALLS[0]], StopReason.CALLS, stream=False
    ),
    "a call whose arguments are no object": Scenario(
        [called("call00001", "read_file", "a.txt")], StopReason.CALLS
    ),
}
WITH_USAGE = ("stream_options", {"include_usage": True})


def completion_chunk(event: dict[str, Any]) -> object:
    """The SDK declares chunks as whole completions; only the last one has a reason."""
    choices = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in event["choices"]]
    return Completion.model_validate(event | {"choices": choices})


def response_event(event: dict[str, Any]) -> object:
    """Codex reads more error codes than the SDK declares."""
    response = event.get("response")
    if response and response["error"]:
        event = event | {"response": response | {"error": response["error"] | {"code": "server_error"}}}
    return TypeAdapter[Any](ResponseStreamEvent).validate_python(event)


@dataclass(frozen=True)
class Dialect:
    """Where it is asked, what a request has besides its scenario, what checks a body and an event."""

    path: str
    body: dict[str, Any]
    scenarios: dict[str, Scenario]
    whole: Callable[[Any], object]
    event: Callable[[Any], object]


DIALECTS = {
    "anthropic": Dialect(
        "/v1/messages",
        {"max_tokens": 20, "messages": [{"role": "user", "content": "hello"}]},
        CHAT_SCENARIOS,
        Message.model_validate,
        TypeAdapter[Any](RawMessageStreamEvent).validate_python,
    ),
    "chat": Dialect(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "hello"}]},
        CHAT_SCENARIOS
        | {
            "usage at the end": Scenario(said("Good morning."), fields=(WITH_USAGE,)),
            "two answers": Scenario(said("Good morning."), fields=(("n", 2), WITH_USAGE)),
            "log probabilities": Scenario(
                [with_logprobs("Hi")], fields=(("logprobs", True), ("top_logprobs", 1))
            ),
        },
        ChatCompletion.model_validate,
        ChatCompletionChunk.model_validate,
    ),
    "completions": Dialect(
        "/v1/completions",
        {"prompt": "hello"},
        SCENARIOS
        | {
            "usage at the end": Scenario(said("Good morning."), fields=(WITH_USAGE,)),
            "two prompts": Scenario(said("Hi"), fields=(("prompt", ["a", "b"]),)),
            "log probabilities": Scenario([with_logprobs("Hi")], fields=(("logprobs", 1),)),
        },
        Completion.model_validate,
        completion_chunk,
    ),
    "responses": Dialect(
        "/v1/responses",
        {"input": "hello", "store": False},
        CHAT_SCENARIOS
        | {
            "a call of a custom tool": Scenario(
                [called("call00001", "patch", '{"input": "*** Begin"}')],
                StopReason.CALLS,
                fields=(("tools", [{"type": "custom", "name": "patch"}]),),
            ),
        },
        Response.model_validate,
        response_event,
    ),
}
IN_NO_UNION = ("ping", "error")
"""Events that Anthropic's SDK reads before it looks at types; OpenAI's does so with `error` without one."""


@pytest.mark.parametrize("name", DIALECTS)
def test_the_wire_is_as_the_golden_file_has_it(
    name: str, service: Service, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    dialect = DIALECTS[name]
    parts = []
    for title, scenario in dialect.scenarios.items():
        play(monkeypatch, scenario.steps, scenario.reason, scenario.stop)
        body = {"model": "fake", **dialect.body, "stream": scenario.stream} | dict(scenario.fields)
        answer = service.http.post(dialect.path, json=body)
        check_types(dialect, answer.text, scenario)
        text = answer.text if scenario.stream else json.dumps(answer.json(), indent=1) + "\n\n"
        parts.append(f"=== {title}: {answer.status_code}\n\n{text}")
    found = numbered("".join(parts))
    file = GOLDEN / f"{name}.txt"
    if request.config.getoption("--regenerate-golden"):
        file.write_text(found)
    expected = file.read_text()
    difference = difflib.unified_diff(expected.splitlines(), found.splitlines(), "golden", "now", lineterm="")
    assert found == expected, "\n".join(difference)


def check_types(dialect: Dialect, text: str, scenario: Scenario) -> None:
    """Whole bodies and events are what the vendor's own SDK declares, required fields and all."""
    if not scenario.stream:
        dialect.whole(json.loads(text))
        return
    for line in text.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if "error" not in event and event.get("type") not in IN_NO_UNION:
                dialect.event(event)


def numbered(text: str) -> str:
    """`text` with ids numbered in the order of their appearance, and without times."""
    ids: dict[str, str] = {}

    def number(match: re.Match[str]) -> str:
        return ids.setdefault(match[0], f"{match[1]}{len(ids) + 1}")

    text = re.sub(r"\b((?:msg|resp|rs|fc|ctc|req)_|(?:chatcmpl|cmpl)-)[0-9a-f]{32}\b", number, text)
    text = re.sub(r'("(?:created|created_at|completed_at)": ?)\d+', r"\g<1>0", text)
    return re.sub(r'("request_id": ?)"[^"]*"', r'\g<1>"req"', text)
