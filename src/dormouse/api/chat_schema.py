"""A chat completion's body, and the conversation that it means."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dormouse.api.schema import GenerationBody
from dormouse.domain.conversation import (
    Conversation,
    Message,
    OutputFormat,
    Role,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
)
from dormouse.domain.errors import InvalidRequest

_ROLES = {"developer": Role.SYSTEM, "function": Role.TOOL}
_TEXTS = ("text", "input_text", "output_text")


class PartBody(BaseModel):
    """A part of a message's content. Only text can be served."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionBody(BaseModel):
    """The function of a call: `arguments` is a JSON text."""

    model_config = ConfigDict(extra="allow")

    name: str
    arguments: str | dict[str, Any] | None = None


class CallBody(BaseModel):
    """A call in an assistant message."""

    model_config = ConfigDict(extra="allow")

    id: str = ""
    type: str = "function"
    function: FunctionBody


class MessageBody(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[PartBody] | None = None
    name: str | None = None
    tool_calls: list[CallBody] | None = None
    function_call: FunctionBody | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def message(self, where: str) -> Message:
        """The message that is meant. Raises InvalidRequest for anything that is not text."""
        named = [(call.id, call.function) for call in self.tool_calls or ()]
        if self.function_call is not None:
            named.append((f"call_{self.function_call.name}", self.function_call))
        return Message(
            _ROLES.get(self.role) or Role(self.role),
            self._text(where),
            self.reasoning_content or self.reasoning or "",
            tuple(ToolCall(call_id, f.name, _arguments(f)) for call_id, f in named),
            self.tool_call_id or (f"call_{self.name}" if self.role == "function" else None),
            self.name,
        )

    def _text(self, where: str) -> str:
        if isinstance(self.content, str) or self.content is None:
            return self.content or ""
        texts = []
        for number, part in enumerate(self.content):
            if part.type == "refusal" or part.type in _TEXTS:
                texts.append(part.text or part.refusal or "")
            else:
                raise InvalidRequest(
                    f"content of type '{part.type}' is not supported; send text",
                    param=f"{where}.content.{number}",
                )
        return "".join(texts)


class ToolFunctionBody(BaseModel):
    """A function that may be called."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        """The tool that is meant."""
        schema = self.parameters or {"type": "object", "properties": {}}
        return Tool(self.name, self.description or "", schema, bool(self.strict))


class ToolBody(BaseModel):
    """A tool; only functions can be called."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: ToolFunctionBody


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[MessageBody], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[ToolFunctionBody] | None = None
    function_call: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    def conversation(self) -> Conversation:
        """The conversation that is meant. Raises InvalidRequest where it cannot be served."""
        messages = [body.message(f"messages.{index}") for index, body in enumerate(self.messages)]
        tools = [body.function.tool() for body in self.tools or ()]
        tools += [body.tool() for body in self.functions or ()]
        return Conversation(
            tuple(messages),
            tuple(tools),
            self._choice([tool.name for tool in tools]),
            output_format(self.response_format, "response_format"),
            self._variables(),
        )

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most; None is as many as there is room for."""
        limit = self.max_completion_tokens
        return self.max_tokens if limit is None else limit

    def _choice(self, names: list[str]) -> ToolChoice:
        wanted = self.tool_choice if self.tool_choice is not None else self.function_call
        if isinstance(wanted, dict) and "name" in wanted and "type" not in wanted:
            wanted = {"type": "function", "function": wanted}  # the older form
        return tool_choice(wanted, names, parallel=self.parallel_tool_calls is not False)

    def _variables(self) -> dict[str, Any]:
        """Variables of the template; what it does not know it never looks at."""
        variables: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            variables = {
                "reasoning_effort": self.reasoning_effort,
                "enable_thinking": self.reasoning_effort != "none",
            }
        return variables | (self.chat_template_kwargs or {})


def tool_choice(wanted: str | dict[str, Any] | None, names: list[str], *, parallel: bool) -> ToolChoice:
    """What a `tool_choice` of either of OpenAI's dialects means. Raises InvalidRequest."""
    if wanted is None:
        return ToolChoice(parallel=parallel)
    if isinstance(wanted, str):
        if wanted not in ("auto", "none", "required"):
            raise InvalidRequest(f"tool_choice '{wanted}' is not known", param="tool_choice")
        return ToolChoice(ToolMode(wanted), parallel=parallel)
    match wanted.get("type"):
        case "function":
            name = _inner(wanted, "function", "tool_choice").get("name")
            chosen, mode, parallel = [str(name)], ToolMode.REQUIRED, False
        case "allowed_tools":
            allowed = _inner(wanted, "allowed_tools", "tool_choice")
            tools = allowed.get("tools") or []
            if not isinstance(tools, list):
                raise InvalidRequest("tool_choice: 'tools' is no list", param="tool_choice")
            chosen = [str(_inner(tool, "function", "tool_choice").get("name")) for tool in tools]
            mode = ToolMode.REQUIRED if allowed.get("mode") == "required" else ToolMode.AUTO
        case kind:
            raise InvalidRequest(f"tool_choice of type '{kind}' is not supported", param="tool_choice")
    for name in set(chosen).difference(names):
        raise InvalidRequest(f"tool_choice names '{name}', which is not among the tools", param="tool_choice")
    return ToolChoice(mode, tuple(chosen), parallel)


def _inner(outer: Any, name: str, where: str) -> dict[str, Any]:
    """The object below `name`, which some dialects leave out. Raises InvalidRequest when it is none."""
    found = outer.get(name) or outer if isinstance(outer, dict) else None
    if not isinstance(found, dict):
        raise InvalidRequest(f"{where}: '{name}' is no object", param=where)
    return found


def output_format(wanted: Any, where: str) -> OutputFormat | None:
    """What a `response_format`, or `text.format`, means. Raises InvalidRequest."""
    if wanted is not None and not isinstance(wanted, dict):
        raise InvalidRequest(f"{where} is no object", param=where)
    match (wanted or {}).get("type", "text"):
        case "text":
            return None
        case "json_object":
            return OutputFormat(None)
        case "json_schema":
            # Chat completions nest what Responses have flat.
            given = _inner(wanted, "json_schema", where)
            schema = given.get("schema")
            if not isinstance(schema, dict):
                raise InvalidRequest("json_schema has no schema", param=f"{where}.json_schema.schema")
            return OutputFormat(schema, strict=bool(given.get("strict")))
        case kind:
            raise InvalidRequest(f"{where} of type '{kind}' is not supported", param=where)


def _arguments(function: FunctionBody) -> str:
    given = function.arguments
    return given if isinstance(given, str) else json.dumps(given or {}, ensure_ascii=False)
