"""A conversation as a chat template takes it: its messages and its tools, bent to what the template allows.

Templates are strict in different ways. What one of them accepts is found out by rendering small probes
when the model is loaded (`accepted_by`), never by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from dormouse.domain.conversation import Conversation, Message, Role, Tool, ToolCall
from dormouse.domain.errors import DormouseError
from dormouse.models.tool_formats.base import ToolFormat, tool_json

TemplateMessages = list[dict[str, Any]]
TemplateTools = list[dict[str, Any]]

_GAP = "\n\n"
_ACKNOWLEDGED = Message(Role.ASSISTANT, "Understood.")


@dataclass(frozen=True, slots=True)
class Accepts:
    """What a template accepts. Without `tools` they are taught in the system message and calls and
    results are written as text. `first_system` is a system message at the start, `any_system` one anywhere.
    With `repeats` one role may speak twice in a row, with `many_calls` one message may call several tools."""

    tools: bool = False
    first_system: bool = True
    any_system: bool = True
    repeats: bool = True
    many_calls: bool = True


Render = Callable[[TemplateMessages, TemplateTools | None], str]


def accepted_by(render: Render, call_id_length: int | None = None) -> Accepts:
    """Find out what a template accepts; `render` is the template."""

    def shows(messages: Sequence[Message], *texts: str, tools: Sequence[Tool] = ()) -> bool:
        chat = [_template_message(message, call_id_length) for message in messages]
        try:
            rendered = render(chat, [tool_json(tool) for tool in tools] or None)
        except DormouseError:
            return False
        return all(text in rendered for text in texts)

    ask, more = Message(Role.USER, "ask"), Message(Role.USER, "more")
    reply, last = Message(Role.ASSISTANT, "reply"), Message(Role.ASSISTANT, "last")
    probe = Tool("probed_function", "A probe.")
    calls = tuple(ToolCall(f"probe000{n}", probe.name, "{}") for n in (1, 2))
    results = [Message(Role.TOOL, f"result {call.id}", call_id=call.id, name=probe.name) for call in calls]
    called = [ask, Message(Role.ASSISTANT, calls=calls), *results]
    first, second = (Message(Role.SYSTEM, f"rule {n}") for n in (1, 2))
    knows_tools = shows([ask], probe.name, tools=[probe])
    # There may be a template of its own for tools; it is the stricter one.
    tools = [probe] if knows_tools else []
    return Accepts(
        tools=knows_tools,
        first_system=shows([first, ask], first.text, tools=tools),
        any_system=shows([first, ask, reply, second, ask], first.text, second.text, tools=tools),
        repeats=shows([ask, more, reply, last], more.text, last.text, tools=tools),
        many_calls=not knows_tools or shows(called, results[1].text, tools=tools),
    )


def template_messages(
    conversation: Conversation, tool_format: ToolFormat, accepts: Accepts
) -> tuple[TemplateMessages, TemplateTools | None]:
    """`conversation` as messages and tools for a template. Depends on nothing but its arguments."""
    messages = list(conversation.messages)
    tools: TemplateTools | None = None
    if accepts.tools:
        tools = [tool_json(tool) for tool in conversation.tools] or None
        if not accepts.many_calls:
            messages = _one_call_each(messages)
    else:
        messages = [_as_text(message, tool_format) for message in messages]
        if conversation.tools:
            messages.insert(0, Message(Role.SYSTEM, tool_format.instruction(conversation.tools)))
            messages = _merged_start(messages)
    if not accepts.any_system:
        messages = _hoisted(messages)
    if not accepts.first_system:
        messages = _without_system(messages)
    if not accepts.repeats:
        messages = _alternating(messages)
    return [_template_message(message, tool_format.call_id_length) for message in messages], tools


def _template_message(message: Message, call_id_length: int | None) -> dict[str, Any]:
    """One message with the keys that templates read. Arguments are objects: templates write the JSON."""
    rendered: dict[str, Any] = {"role": message.role.value, "content": message.text}
    if message.reasoning:
        rendered["reasoning_content"] = message.reasoning
    if message.calls:
        rendered["tool_calls"] = [
            {
                "type": "function",
                "id": _call_id(call.id, call_id_length),
                "function": {"name": call.name, "arguments": call.parsed()},
            }
            for call in message.calls
        ]
    if message.role is Role.TOOL:
        rendered["tool_call_id"] = _call_id(message.call_id or "", call_id_length)
        if message.name:
            rendered["name"] = message.name
    return rendered


def _call_id(call_id: str, length: int | None) -> str:
    """The id, or one of `length` letters and digits that is always the same for it."""
    if length is None or (len(call_id) == length and call_id.isascii() and call_id.isalnum()):
        return call_id
    return hashlib.blake2b(call_id.encode(errors="replace"), digest_size=32).hexdigest()[:length]


def _as_text(message: Message, tool_format: ToolFormat) -> Message:
    """Calls and results in the words of the format."""
    if message.calls:
        text = "\n".join(part for part in (message.text, tool_format.written(message.calls)) if part)
        return replace(message, text=text, calls=())
    if message.role is Role.TOOL:
        return Message(Role.USER, tool_format.answered(message))
    return message


def _merged_start(messages: list[Message]) -> list[Message]:
    """The first system messages as one: the client's own words, then the tools."""
    first, *rest = messages
    if rest and rest[0].role is Role.SYSTEM:
        return [
            replace(rest[0], text=_GAP.join(text for text in (rest[0].text, first.text) if text)),
            *rest[1:],
        ]
    return messages


def _hoisted(messages: list[Message]) -> list[Message]:
    """All system messages as one at the start."""
    system = [message.text for message in messages if message.role is Role.SYSTEM]
    others = [message for message in messages if message.role is not Role.SYSTEM]
    return [Message(Role.SYSTEM, _GAP.join(system)), *others] if system else others


def _without_system(messages: list[Message]) -> list[Message]:
    """System messages as words of the user, in front of what the user says next."""
    return [
        replace(message, role=Role.USER) if message.role is Role.SYSTEM else message for message in messages
    ]


def _alternating(messages: list[Message]) -> list[Message]:
    """What one side says in a row as one message. Templates that insist on turns do not count calls and
    results, so a user who speaks right after a result gets a short answer before."""
    merged: list[Message] = []
    for _, group in groupby(messages, _speaker):
        run = list(group)
        text = _GAP.join(message.text for message in run if message.text)
        reasoning = _GAP.join(message.reasoning for message in run if message.reasoning)
        calls = tuple(call for message in run for call in message.calls)
        message = replace(run[0], text=text, reasoning=reasoning, calls=calls)
        if message.role is Role.USER and merged and merged[-1].role is Role.TOOL:
            merged.append(_ACKNOWLEDGED)
        merged.append(message)
    return merged


def _speaker(message: Message) -> object:
    """Who speaks; results stand each for itself."""
    return message.role if message.role in (Role.USER, Role.ASSISTANT) else id(message)


def _one_call_each(messages: list[Message]) -> list[Message]:
    """Several calls in one message as several messages, each followed by its result."""
    results = {message.call_id: message for message in messages if message.role is Role.TOOL}
    spread: list[Message] = []
    placed: set[int] = set()
    for message in messages:
        if len(message.calls) > 1:
            for index, call in enumerate(message.calls):
                # The words before the calls belong to the first of them.
                said = message if index == 0 else replace(message, text="", reasoning="")
                spread.append(replace(said, calls=(call,)))
                if (result := results.get(call.id)) is not None:
                    spread.append(result)
                    placed.add(id(result))
        elif id(message) not in placed:
            spread.append(message)
    return spread
