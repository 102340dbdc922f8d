"""The four ways in which agents speak: a conversation as a body, and the events of a stream as a reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from benchmarks.soak.replies import Reply
from dormouse.domain.conversation import Message, Role, Tool, ToolCall

Body = dict[str, Any]
MODEL = "smollm2"


@dataclass(frozen=True)
class Ask:
    """What an agent wants continued. `new` are the messages since the last reply, the end of `messages`;
    `after` is the last reply's id. With `calls` the reply has to be a call of one of the tools."""

    agent: str
    system: str
    messages: Sequence[Message]
    new: Sequence[Message]
    max_tokens: int
    tools: Sequence[Tool] = ()
    calls: bool = False
    after: str = ""


class Dialect(Protocol):
    """Path, headers and body of a streamed, greedy request, and how its events are read."""

    def path(self, ask: Ask) -> str:
        """Where to send it."""
        ...

    def body(self, ask: Ask) -> Body:
        """What to send."""
        ...

    def read(self, event: Mapping[str, Any], reply: Reply) -> None:
        """Add what an event of the stream says to the reply."""
        ...


class Chat:
    """OpenAI's chat completions: the whole conversation each time."""

    def path(self, ask: Ask) -> str:
        """The same for all."""
        del ask
        return "/v1/chat/completions"

    def body(self, ask: Ask) -> Body:
        """With the system prompt in front."""
        system = [{"role": "system", "content": ask.system}]
        return self._common(ask) | {"model": MODEL, "messages": system + self._said(ask.messages)}

    def read(self, event: Mapping[str, Any], reply: Reply) -> None:
        """A chunk; the last one has the usage."""
        if "error" in event:
            reply.error, reply.error_code = event["error"]["message"], str(event["error"]["code"])
            return
        if usage := event.get("usage"):
            reply.prompt_tokens = usage["prompt_tokens"]
            reply.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
            reply.generated_tokens = usage["completion_tokens"]
        for choice in event["choices"]:
            delta = choice["delta"]
            reply.text += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                _add_call(reply, call)
            reply.is_whole |= choice["finish_reason"] is not None

    def _common(self, ask: Ask) -> Body:
        body: Body = {
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ask.tools:
            body["tools"] = [
                {
                    "type": "function",
                    "function": {"name": t.name, "description": t.description, "parameters": t.parameters},
                }
                for t in ask.tools
            ]
            body["tool_choice"] = "required" if ask.calls else "none"
        return body

    def _said(self, messages: Sequence[Message]) -> list[Body]:
        return [_chat_message(message) for message in messages]


class Agents(Chat):
    """`/v1/agents/{name}/messages`: the server keeps the conversation, only the new turn travels."""

    def path(self, ask: Ask) -> str:
        """The agent's own."""
        return f"/v1/agents/{ask.agent}/messages"

    def body(self, ask: Ask) -> Body:
        """What is new; the agent was made with its system prompt."""
        return self._common(ask) | {"messages": self._said(ask.new)}


class Messages:
    """Anthropic's messages."""

    def path(self, ask: Ask) -> str:
        """The same for all."""
        del ask
        return "/v1/messages"

    def body(self, ask: Ask) -> Body:
        """The whole conversation, with results of tools as a user's blocks."""
        body: Body = {
            "model": "claude-sonnet-4-5",
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "stream": True,
            "system": [{"type": "text", "text": ask.system, "cache_control": {"type": "ephemeral"}}],
            "messages": [_blocks(message) for message in ask.messages],
        }
        if ask.tools:
            body["tools"] = [
                {"name": t.name, "description": t.description, "input_schema": t.parameters}
                for t in ask.tools
            ]
            body["tool_choice"] = {"type": "any" if ask.calls else "none"}
        return body

    def read(self, event: Mapping[str, Any], reply: Reply) -> None:
        """One event of the message."""
        match event["type"]:
            case "message_start":
                reply.id = event["message"]["id"]
            case "content_block_start" if event["content_block"]["type"] == "tool_use":
                block = event["content_block"]
                reply.calls.append(ToolCall(block["id"], block["name"], ""))
            case "content_block_delta" if "partial_json" in event["delta"]:
                last = reply.calls[-1]
                reply.calls[-1] = replace(last, arguments=last.arguments + event["delta"]["partial_json"])
            case "content_block_delta":
                reply.text += event["delta"].get("text", "")
            case "message_delta":
                used = event["usage"]
                reply.cached_tokens = used["cache_read_input_tokens"]
                written = used["cache_creation_input_tokens"]
                reply.prompt_tokens = used["input_tokens"] + written + reply.cached_tokens
                reply.generated_tokens = used["output_tokens"]
            case "message_stop":
                reply.is_whole = True
            case "error":
                reply.error, reply.error_code = event["error"]["message"], event["error"]["type"]


class Responses:
    """OpenAI's Responses: a past that the server keeps, named by the last response's id."""

    def path(self, ask: Ask) -> str:
        """The same for all."""
        del ask
        return "/v1/responses"

    def body(self, ask: Ask) -> Body:
        """What is new, and what it follows."""
        body: Body = {
            "model": MODEL,
            "instructions": ask.system,
            "input": [{"type": "message", "role": m.role.value, "content": m.text} for m in ask.new],
            "max_output_tokens": ask.max_tokens,
            "temperature": 0,
            "stream": True,
        }
        return body | ({"previous_response_id": ask.after} if ask.after else {})

    def read(self, event: Mapping[str, Any], reply: Reply) -> None:
        """One event of the response."""
        match event["type"]:
            case "response.output_text.delta":
                reply.text += event["delta"]
            case "response.completed" | "response.incomplete":
                response = event["response"]
                used = response["usage"]
                reply.id = response["id"]
                reply.prompt_tokens = used["input_tokens"]
                reply.cached_tokens = used["input_tokens_details"]["cached_tokens"]
                reply.generated_tokens = used["output_tokens"]
                reply.is_whole = True
            case "response.failed":
                error = event["response"]["error"]
                reply.error, reply.error_code = error["message"], error["code"]


DIALECTS: dict[str, Dialect] = {
    "chat": Chat(),
    "messages": Messages(),
    "responses": Responses(),
    "agents": Agents(),
}


def _add_call(reply: Reply, part: Mapping[str, Any]) -> None:
    """A call comes in parts: its name first, then its arguments."""
    function = part["function"]
    if part["index"] == len(reply.calls):
        reply.calls.append(ToolCall(part["id"], function["name"], ""))
    call = reply.calls[part["index"]]
    reply.calls[part["index"]] = replace(call, arguments=call.arguments + function.get("arguments", ""))


def _chat_message(message: Message) -> Body:
    said: Body = {"role": message.role.value, "content": message.text}
    if message.call_id is not None:
        said["tool_call_id"] = message.call_id
    if message.calls:
        said["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.calls
        ]
    return said


def _blocks(message: Message) -> Body:
    if message.role is Role.TOOL:
        result = {"type": "tool_result", "tool_use_id": message.call_id, "content": message.text}
        return {"role": "user", "content": [result]}
    blocks: list[Body] = [{"type": "text", "text": message.text}] if message.text else []
    blocks += [{"type": "tool_use", "id": c.id, "name": c.name, "input": c.parsed()} for c in message.calls]
    return {"role": message.role.value, "content": blocks}
