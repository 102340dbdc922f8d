"""Anthropic's events: one block open at a time, each with its name, in the order that clients insist on."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from dormouse.api.answer import Delta, End, StopReason
from dormouse.domain.conversation import Called, Piece, Said, Thought, ToolCall
from dormouse.domain.requests import Usage

_REASONS = {
    StopReason.END: "end_turn",
    StopReason.CALLS: "tool_use",
    StopReason.STOP_STRING: "stop_sequence",
    StopReason.MAX_TOKENS: "max_tokens",
    StopReason.CONTEXT_FULL: "model_context_window_exceeded",
}
_SIGNATURE = "dormouse"
"""Clients require one on every thinking block and send it back; nothing here depends on it."""

Event = dict[str, Any]


def new_message_id() -> str:
    """An id as this dialect has them."""
    return f"msg_{uuid.uuid4().hex}"


def usage(used: Usage, block_size: int) -> dict[str, Any]:
    """Input tokens exclude what was found and what is kept: the whole blocks that were computed."""
    written = max(0, used.prompt_tokens // block_size * block_size - used.cached_tokens)
    return {
        "input_tokens": used.prompt_tokens - used.cached_tokens - written,
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": used.cached_tokens,
        "cache_creation": {"ephemeral_5m_input_tokens": written, "ephemeral_1h_input_tokens": 0},
        "output_tokens": used.completion_tokens,
        "service_tier": "standard",
    }


def message(
    id: str, model: str, end: End, diagnostics: dict[str, Any] | None, block_size: int
) -> dict[str, Any]:
    """The body of a reply that was not streamed."""
    content: list[dict[str, Any]] = []
    if end.reply.reasoning:
        content.append({"type": "thinking", "thinking": end.reply.reasoning, "signature": _SIGNATURE})
    if end.reply.text:
        content.append({"type": "text", "text": end.reply.text})
    content += [_tool_use(call, json.loads(_input_json(call))) for call in end.reply.calls]
    return {
        **_message(id, model, content, _whole_usage(end, block_size)),
        "stop_reason": _REASONS[end.reason],
        "stop_sequence": end.stop,
        **({"diagnostics": diagnostics} if diagnostics is not None else {}),
    }


class MessageStream:
    """The events of one streamed reply."""

    def __init__(self, id: str, model: str, block_size: int) -> None:
        self._id = id
        self._model = model
        self._block_size = block_size
        self._index = -1
        self._open: str | None = None

    def first(self, used: Usage, diagnostics: dict[str, Any] | None) -> Iterator[Event]:
        """`message_start`, with what is known of the prompt: clients read their context use here."""
        body = _message(self._id, self._model, [], usage(used, self._block_size))
        body |= {"stop_reason": None, "stop_sequence": None}
        if diagnostics is not None:
            body["diagnostics"] = diagnostics
        yield {"type": "message_start", "message": body}

    def delta(self, delta: Delta) -> Iterator[Event]:
        """New pieces."""
        for piece in delta.pieces:
            yield from self._piece(piece)

    def last(self, end: End) -> Iterator[Event]:
        """The end of the last block and of the message."""
        yield from self._close()
        details = {"stop_reason": _REASONS[end.reason], "stop_sequence": end.stop}
        yield {"type": "message_delta", "delta": details, "usage": _whole_usage(end, self._block_size)}
        yield {"type": "message_stop"}

    def _piece(self, piece: Piece) -> Iterator[Event]:
        match piece:
            case Said(text):
                yield from self._switch("text", {"type": "text", "text": ""})
                yield self._block_delta({"type": "text_delta", "text": text})
            case Thought(text):
                yield from self._switch("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._block_delta({"type": "thinking_delta", "thinking": text})
            case Called(call):
                yield from self._close()
                yield from self._switch("tool_use", _tool_use(call, {}))
                yield self._block_delta({"type": "input_json_delta", "partial_json": _input_json(call)})
                yield from self._close()

    def _switch(self, kind: str, empty: dict[str, Any]) -> Iterator[Event]:
        """Have a block of `kind` open."""
        if self._open == kind:
            return
        yield from self._close()
        self._index += 1
        self._open = kind
        yield {"type": "content_block_start", "index": self._index, "content_block": empty}

    def _close(self) -> Iterator[Event]:
        if self._open == "thinking":
            yield self._block_delta({"type": "signature_delta", "signature": _SIGNATURE})
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = None

    def _block_delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _message(id: str, model: str, content: list[dict[str, Any]], used: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "usage": used,
    }


def _whole_usage(end: End, block_size: int) -> dict[str, Any]:
    return usage(end.usage, block_size) | {
        "output_tokens_details": {"thinking_tokens": end.reasoning_tokens},
    }


def _tool_use(call: ToolCall, given: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": given}


def _input_json(call: ToolCall) -> str:
    """The arguments as the JSON object that clients insist on; what a model made of something else stays
    readable in it."""
    given = call.parsed()
    if isinstance(given, dict):
        return call.arguments or "{}"
    return json.dumps({"arguments": call.arguments}, ensure_ascii=False)
