"""What clients of OpenAI's Responses send, and the conversation that it means."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from dormouse.api.chat_schema import output_format, tool_choice
from dormouse.api.identity import Hints
from dormouse.domain.conversation import Conversation, Message, Role, Tool, ToolCall
from dormouse.domain.errors import InvalidRequest
from dormouse.domain.requests import SamplingParams

Item = dict[str, Any]

_ROLES = {
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
}
FREEFORM = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
"""A custom tool takes free text: a function of one string, as far as the model is concerned."""


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools that can be called, and how their calls are told to the client: `custom` ones as free text;
    `origins` are the namespace and name of each as the client knows it. What a server would have to run
    itself is left out."""

    tools: tuple[Tool, ...] = ()
    custom: frozenset[str] = frozenset()
    origins: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)


class ResponsesBody(BaseModel):
    """`POST /v1/responses`. Unknown fields and items of unknown types are passed over."""

    model_config = ConfigDict(extra="ignore")

    model: str
    input: str | list[Item] = Field(default_factory=list)
    instructions: str | None = None
    tools: list[Item] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    truncation: str | None = None
    top_logprobs: int | None = None
    prompt: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: str | None = None
    user: str | None = None
    client_metadata: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise InvalidRequest, by name, for what would be silently missing."""
        for name in ("conversation", "background", "top_logprobs", "prompt"):
            if getattr(self, name):
                raise InvalidRequest(f"'{name}' is not supported by this server; leave it out", param=name)
        if self.truncation not in (None, "disabled"):
            raise InvalidRequest(
                "nothing is cut from a conversation here; leave truncation out, and send less",
                param="truncation",
            )
        try:
            json.dumps(self.model_dump(), ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest("the body has lone surrogates; send valid Unicode") from error

    def items(self) -> list[Item]:
        """The input as items."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return self.input

    def toolbox(self) -> Toolbox:
        """The tools. Raises InvalidRequest for one without a name."""
        return _toolbox(self.tools or ())

    def conversation_after(self, past: Sequence[Item], toolbox: Toolbox) -> Conversation:
        """The conversation of `past` items and this body's. Instructions are this request's alone."""
        messages = [Message(Role.SYSTEM, self.instructions)] if self.instructions else []
        messages += _messages(_resolved(past, self.items()))
        if not messages:
            raise InvalidRequest("input is empty; send at least one item", param="input")
        names = [tool.name for tool in toolbox.tools]
        parallel = self.parallel_tool_calls is not False
        return Conversation(
            tuple(messages),
            toolbox.tools,
            tool_choice(self._choice(), names, parallel=parallel),
            output_format((self.text or {}).get("format"), "text.format"),
            self._variables(),
        )

    def sampling(self) -> SamplingParams:
        """The sampling this body asks for."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
        )

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most; none at all to warm the cache."""
        return 0 if (self.prompt_cache_options or {}).get("prewarm") else self.max_output_tokens

    def hints(self) -> Hints:
        """What the body says about who asks."""
        return Hints(
            bool(self.tools),
            prompt_cache_key=self.prompt_cache_key,
            user=self.user or self.safety_identifier,
            client_metadata=self.client_metadata,
        )

    def _choice(self) -> str | dict[str, Any] | None:
        if isinstance(self.tool_choice, dict) and self.tool_choice.get("type") == "custom":
            return {"type": "function", "name": self.tool_choice.get("name")}
        return self.tool_choice

    def _variables(self) -> dict[str, Any]:
        effort = (self.reasoning or {}).get("effort")
        return {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}


def _toolbox(items: Iterable[Any], namespace: str | None = None) -> Toolbox:
    tools: list[Tool] = []
    custom: set[str] = set()
    origins: dict[str, tuple[str | None, str]] = {}
    for item in items:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind not in ("function", "custom", "namespace"):
            continue
        name = item.get("name")
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"a {kind} among the tools has no name", param="tools")
        if kind == "namespace":
            inner = _toolbox(_listed(item.get("tools"), "tools"), name)
            tools += inner.tools
            custom |= inner.custom
            origins |= inner.origins
            continue
        # The model sees where a tool is from: two namespaces may have one of the same name.
        shown = name if namespace is None else f"{namespace}__{name}"
        origins[shown] = (namespace, name)
        description = str(item.get("description") or "")
        if kind == "custom":
            custom.add(shown)
            tools.append(Tool(shown, description, FREEFORM))
        else:
            schema = item.get("parameters") or {"type": "object", "properties": {}}
            if not isinstance(schema, dict):
                raise InvalidRequest(f"the parameters of tool '{name}' are no object", param="tools")
            tools.append(Tool(shown, description, schema, bool(item.get("strict"))))
    return Toolbox(tuple(tools), frozenset(custom), origins)


def _resolved(past: Sequence[Item], items: Iterable[Item]) -> Iterator[Item]:
    """The past and the input, with the items that are only named in their places. Raises InvalidRequest."""
    known = {str(item.get("id")) for item in past}
    yield from past
    for index, item in enumerate(items):
        if item.get("type") != "item_reference":
            yield item
        elif str(item.get("id")) not in known:
            raise InvalidRequest(
                f"item '{item.get('id')}' is not stored here; send the item itself", param=f"input.{index}"
            )
        # One of the past is where it was.


def _listed(value: Any, where: str) -> list[Any]:
    """A list, or none at all. Raises InvalidRequest."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidRequest(f"{where} is no list", param=where)
    return value


def _messages(items: Iterable[Item]) -> list[Message]:
    """Items as messages: what the assistant thought, said and called in a row is one message."""
    read = (_message(item, f"input.{index}") for index, item in enumerate(items))
    messages: list[Message] = []
    for role, group in groupby((message for message in read if message is not None), lambda each: each.role):
        run = list(group)
        if role is Role.ASSISTANT:
            text = "".join(message.text for message in run)
            reasoning = "".join(message.reasoning for message in run)
            calls = tuple(call for message in run for call in message.calls)
            run = [replace(run[0], text=text, reasoning=reasoning, calls=calls)]
        messages += run
    return messages


def _message(item: Item, where: str) -> Message | None:
    match item.get("type", "message"):
        case "message":
            role = _ROLES.get(str(item.get("role")))
            if role is None:
                raise InvalidRequest(f"role '{item.get('role')}' is not known", param=f"{where}.role")
            return Message(role, _text(item.get("content"), where))
        case "function_call" | "custom_tool_call" as kind:
            call_id, name = str(item.get("call_id") or item.get("id") or ""), str(item.get("name") or "")
            given = item.get("arguments") or "{}"
            arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            if item.get("namespace"):
                name = f"{item['namespace']}__{name}"
            if kind == "custom_tool_call":
                arguments = json.dumps({"input": item.get("input") or ""}, ensure_ascii=False)
            return Message(Role.ASSISTANT, calls=(ToolCall(call_id, name, arguments),))
        case "function_call_output" | "custom_tool_call_output":
            return Message(
                Role.TOOL, _text(item.get("output"), where), call_id=str(item.get("call_id") or "")
            )
        case "reasoning":
            parts = _listed(item.get("content") or item.get("summary"), where)
            text = "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
            return Message(Role.ASSISTANT, reasoning=text) if text else None
    return None


def _text(content: Any, where: str) -> str:
    """The text of a message or of a tool's output. Raises InvalidRequest for what the model cannot read."""
    if isinstance(content, str) or content is None:
        return content or ""
    if not isinstance(content, list):
        return json.dumps(content, ensure_ascii=False)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_text", "output_text", "text"):
            texts.append(str(part.get("text") or ""))
        elif kind == "refusal":
            texts.append(str(part.get("refusal") or ""))
        else:
            raise InvalidRequest(
                f"content of type '{kind}' is not supported; send text", param=f"{where}.content.{number}"
            )
    return "".join(texts)
