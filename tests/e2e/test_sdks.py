"""The vendors' own SDKs against the real server and model: streams, tool results, kept responses, counts."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from benchmarks.server import Server, serve
from tests.docs.clients_page import blocks, commands
from tests.live import wait_for
from tests.stress.watch import chat_statuses, idle, state

from dormouse.models.folder import ModelFolder

pytestmark = [pytest.mark.usefixtures("smollm2"), pytest.mark.timeout(300)]

MODEL = "smollm2"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
QUESTION = "What is the weather like in Bergen? Use the tool." + " Bergen lies by the sea." * 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2: ModelFolder) -> Iterator[Server]:
    assert smollm2.path
    with serve(tmp_path_factory.mktemp("data")) as server:
        yield server


@pytest.fixture(scope="module")
def gpt(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_openai_chat_streams(gpt: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Count to five."}]
    asked: Any = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 24}
    whole = gpt.chat.completions.create(**asked)
    with gpt.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        final = stream.until_done().get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.usage
    assert whole.usage
    assert final.usage.total_tokens == whole.usage.total_tokens


def test_openai_chat_takes_tool_results(gpt: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    called = {"name": "weather", "arguments": '{"city":"Bergen"}'}
    call = {"id": "call_1", "type": "function", "function": called}
    messages: Any = [{"role": "user", "content": QUESTION}]
    asked: Any = {"model": MODEL, "tools": [tool], "temperature": 0, "max_tokens": 16}
    first = gpt.chat.completions.create(messages=messages, **asked)
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain, 8 degrees."},
    ]
    second = gpt.chat.completions.create(messages=messages, **asked)
    assert second.choices[0].message.content
    assert first.usage
    assert second.usage
    assert second.usage.prompt_tokens_details
    # The turns before the call stand as they stood; what follows the question is new.
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens - 16


def test_openai_responses_go_on_from_the_one_before(gpt: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 64}
    first = gpt.responses.create(input="My name is Ada." + " I live by the sea." * 40, **asked)
    assert first.usage
    with gpt.responses.stream(input="What is my name?", previous_response_id=first.id, **asked) as stream:
        kinds = [event.type for event in stream]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    kept = gpt.responses.create(input="What is my name?", previous_response_id=first.id, **asked)
    assert kept.output_text
    assert kept.usage
    past = first.usage.total_tokens
    assert kept.usage.input_tokens > past
    assert kept.usage.input_tokens_details.cached_tokens > past
    again = gpt.responses.retrieve(kept.id)
    assert again.output_text == kept.output_text
    gpt.responses.delete(kept.id)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve(kept.id)


def test_anthropic_messages_stream_and_count(claude: anthropic.Anthropic) -> None:
    tool: Any = {"name": "weather", "description": "The weather.", "input_schema": PARAMETERS}
    asked: Any = {
        "model": MODEL,
        "system": [{"type": "text", "text": "You are brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": QUESTION}],
        "tools": [tool],
    }
    counted = claude.messages.count_tokens(**asked).input_tokens
    with claude.messages.stream(max_tokens=16, **asked) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == "".join(block.text for block in message.content if block.type == "text")
    assert prompt_tokens(message.usage) == counted
    assert 0 < message.usage.output_tokens <= 16
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}
    asked["messages"] += [
        {"role": "assistant", "content": [call]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Rain, 8 degrees."},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    reply = claude.messages.create(max_tokens=16, **asked)
    assert reply.content
    assert (reply.usage.cache_read_input_tokens or 0) > counted - 16


def test_anthropic_errors_are_theirs(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        claude.messages.create(
            model=MODEL, max_tokens=8, messages=[{"role": "user", "content": "sea " * 20_000}]
        )
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(
            model="no such model", max_tokens=8, messages=[{"role": "user", "content": "hello"}]
        )


def test_who_leaves_while_the_prompt_is_read_leaves_nothing_running(server: Server) -> None:
    impatient = openai.Timeout(60, read=0.3)
    with (
        server.client() as http,
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=impatient
        ) as client,
    ):
        before, calls = idle(http), chat_statuses(http).total()
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Far out at sea. " * 1500}],
                max_tokens=2000,
            )
        # It may have left before the engine, or the server at all, had heard of it.
        wait_for(http, lambda _: chat_statuses(http).total() > calls and not state(http)["queue"]["open"])
        after = idle(http)
    assert after["generated_tokens"] == before["generated_tokens"]


@pytest.mark.parametrize("heading", ["OpenAI SDK", "Anthropic SDK"])
def test_the_pages_examples_run(server: Server, heading: str, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks(heading, "python", server.url)
    scope: dict[str, Any] = {}
    exec(compile(example, heading, "exec"), scope)
    scope["client"].close()
    assert len(capsys.readouterr().out) > 10


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl_needs_no_more_than_the_page_says(server: Server) -> None:
    for command in commands("curl", server.url):
        done = subprocess.run([*command, "--silent"], capture_output=True, text=True, timeout=60, check=True)
        assert "error" not in json.loads(done.stdout) or json.loads(done.stdout)["error"] is None


def prompt_tokens(usage: anthropic.types.Usage) -> int:
    """All of the prompt; `input_tokens` leaves out what was found or is kept."""
    return (
        usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    )
