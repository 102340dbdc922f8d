"""What Anthropic's clients send, and what it means. Unknown fields are ignored: Claude Code counts on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dormouse.api.identity import Hints
from dormouse.api.schema import MAX_STOPS, StopString
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
from dormouse.domain.requests import SamplingParams
from dormouse.models.canonical import without_attribution

Block = dict[str, Any]
Content = str | list[Block]

_SILENT = frozenset(
    {"thinking", "redacted_thinking", "server_tool_use", "container_upload", "fallback", "compaction"}
)
"""Blocks that are no part of what the model reads as text; thinking is taken apart from them."""


class TurnBody(BaseModel):
    """A message. `system` may stand between the others (Claude Code since 2.1.154)."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["user", "assistant", "system"]
    content: Content


class ToolBody(BaseModel):
    """A tool of the client, or with a `type` of its own a server's tool, which has no schema."""

    model_config = ConfigDict(extra="ignore")

    name: str = ""
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoiceBody(BaseModel):
    """Which tools may or must be called."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingBody(BaseModel):
    """Whether the model reasons before it answers."""

    model_config = ConfigDict(extra="ignore")

    type: str


class PromptBody(BaseModel):
    """What counting and answering have in common."""

    model_config = ConfigDict(extra="ignore")

    model: str
    messages: Annotated[list[TurnBody], Field(min_length=1)]
    system: Content | None = None
    tools: list[ToolBody] | None = None
    tool_choice: ToolChoiceBody | None = None
    thinking: ThinkingBody | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None

    def conversation(self) -> Conversation:
        """The conversation that is meant. Raises InvalidRequest for content that is not text."""
        messages = [*self._system()]
        for index, turn in enumerate(self.messages):
            messages += _messages(turn, f"messages.{index}.content")
        last = messages[-1] if messages else None
        return Conversation(
            tuple(messages),
            self._tools(),
            self._choice(),
            self._format(),
            self._variables(),
            # A last assistant turn is the beginning of the answer.
            continues=last is not None and last.role is Role.ASSISTANT and not last.calls,
        )

    def _system(self) -> Iterator[Message]:
        blocks = [{"type": "text", "text": self.system}] if isinstance(self.system, str) else self.system
        texts = [without_attribution(_text(block, "system")) for block in blocks or ()]
        text = "\n\n".join(text for text in texts if text)
        if text:
            yield Message(Role.SYSTEM, text)

    def _tools(self) -> tuple[Tool, ...]:
        # Server tools (web search, ...) are offered by nobody here; refusing them would end the session.
        return tuple(
            Tool(tool.name, tool.description or "", tool.input_schema, bool(tool.strict))
            for tool in self.tools or ()
            if tool.input_schema is not None and tool.name
        )

    def _choice(self) -> ToolChoice:
        choice = self.tool_choice
        if choice is None:
            return ToolChoice()
        if choice.type == "tool":
            known = [tool.name for tool in self.tools or ()]
            if choice.name not in known:
                raise InvalidRequest(
                    f"tool_choice names '{choice.name}', which is not among the tools", param="tool_choice"
                )
            return ToolChoice(ToolMode.REQUIRED, (str(choice.name),), parallel=False)
        mode = {"auto": ToolMode.AUTO, "any": ToolMode.REQUIRED, "none": ToolMode.NONE}[choice.type]
        return ToolChoice(mode, parallel=not choice.disable_parallel_tool_use)

    def _format(self) -> OutputFormat | None:
        wanted = (self.output_config or {}).get("format") or self.output_format
        if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
            return None
        schema = wanted.get("schema")
        if not isinstance(schema, dict):
            raise InvalidRequest("the output format has no schema", param="output_config.format.schema")
        return OutputFormat(schema)

    def _variables(self) -> dict[str, Any]:
        """Templates of reasoning models know `enable_thinking`; others never look. Who does not ask for
        thinking reads the first block as the answer."""
        return {"enable_thinking": self.thinking is not None and self.thinking.type != "disabled"}


class MessagesBody(PromptBody):
    """`POST /v1/messages`. `max_tokens` 0 computes and stores the prompt, and answers nothing."""

    max_tokens: Annotated[int, Field(ge=0)]
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    metadata: dict[str, Any] | None = None
    diagnostics: dict[str, Any] | None = None

    def sampling(self) -> SamplingParams:
        """The sampling this body asks for, with the dialect's defaults."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            stop=tuple(stop for stop in self.stop_sequences or () if stop),
        )

    def hints(self) -> Hints:
        """What the body says about who asks."""
        user = (self.metadata or {}).get("user_id")
        return Hints(bool(self.tools), metadata_user_id=user if isinstance(user, str) else None)

    @property
    def previous_message_id(self) -> str | None:
        """The reply that this request is compared with, where the client wants to know why it missed."""
        previous = (self.diagnostics or {}).get("previous_message_id")
        return previous if isinstance(previous, str) else None


def _messages(turn: TurnBody, where: str) -> list[Message]:
    """A turn's messages: tool results are messages of their own, before the text beside them."""
    blocks = [{"type": "text", "text": turn.content}] if isinstance(turn.content, str) else list(turn.content)
    if turn.role == "assistant":
        return [_assistant(blocks, where)]
    if turn.role == "system":
        texts = [without_attribution(_text(block, where)) for block in blocks]
        return [Message(Role.SYSTEM, "\n\n".join(texts))]
    results = [_result(block, where) for block in blocks if block.get("type") == "tool_result"]
    texts = [_text(block, where) for block in blocks if block.get("type") != "tool_result"]
    text = "\n\n".join(text for text in texts if text)
    return results + ([Message(Role.USER, text)] if text or not results else [])


def _assistant(blocks: Sequence[Block], where: str) -> Message:
    text = "".join(_text(block, where) for block in blocks if block.get("type") != "tool_use")
    # Any signature will do: it was ours, or another server's.
    thought = "".join(str(block.get("thinking", "")) for block in blocks if block.get("type") == "thinking")
    calls = tuple(_call(block, where) for block in blocks if block.get("type") == "tool_use")
    return Message(Role.ASSISTANT, text, thought, calls)


def _call(block: Block, where: str) -> ToolCall:
    if not isinstance(block.get("name"), str):
        raise InvalidRequest("a tool_use block has no name", param=where)
    arguments = json.dumps(block.get("input", {}), ensure_ascii=False)
    return ToolCall(str(block.get("id", "")), block["name"], arguments)


def _result(block: Block, where: str) -> Message:
    text = _texts(block.get("content"), where)
    if block.get("is_error"):
        text = f"Error: {text}"
    return Message(Role.TOOL, text, call_id=str(block.get("tool_use_id", "")))


def _text(block: Mapping[str, Any], where: str) -> str:
    """The text of a block. Raises InvalidRequest for what the model cannot read."""
    kind = block.get("type")
    match kind:
        case "text":
            return str(block.get("text") or "")
        case "tool_reference":
            return str(block.get("tool_name") or "")
        case "search_result":
            return _texts(block.get("content"), where)
        case "document":
            return _document(block.get("source"), where)
        case str() if kind in _SILENT or kind.endswith("_tool_result"):
            return ""
    raise InvalidRequest(f"content of type '{kind}' is not supported by this model; send text", param=where)


def _texts(content: Any, where: str) -> str:
    """The text of a content: a text, or a list of blocks. Raises InvalidRequest."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise InvalidRequest("content is neither a text nor a list of blocks", param=where)
    return "\n".join(_text(part, where) for part in content)


def _document(source: Any, where: str) -> str:
    if isinstance(source, dict) and source.get("type") == "text":
        return str(source.get("data") or "")
    if isinstance(source, dict) and source.get("type") == "content":
        return _texts(source.get("content"), where)
    raise InvalidRequest("only documents of plain text are supported; send text", param=where)
