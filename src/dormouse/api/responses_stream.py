"""The objects and events of OpenAI's Responses: one item open at a time, each begun, filled and done."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from dormouse.api.answer import Delta, End, StopReason
from dormouse.api.responses_schema import Item, ResponsesBody, Toolbox
from dormouse.domain.conversation import Called, Piece, Said, Thought, ToolCall
from dormouse.domain.errors import ContextLengthExceeded, DormouseError, QueueFull, RateLimited, Unavailable

Event = dict[str, Any]


def new_id(prefix: str) -> str:
    """An id as this dialect has them."""
    return f"{prefix}_{uuid.uuid4().hex}"


class ResponseStream:
    """One response as it grows: its items, its events and its final object."""

    def __init__(self, body: ResponsesBody, toolbox: Toolbox) -> None:
        self.id = new_id("resp")
        self._body = body
        self._toolbox = toolbox
        self._created = int(time.time())
        self._sequence = 0
        self._output: list[Item] = []
        self._open: Item | None = None

    def first(self) -> Iterator[Event]:
        """What a stream begins with."""
        yield self._event("response.created", response=self.object("in_progress"))
        yield self.alive()

    def alive(self) -> Event:
        """A sign of life: clients count events, and take no comment for one (openai/codex#31539)."""
        return self._event("response.in_progress", response=self.object("in_progress"))

    def delta(self, delta: Delta) -> Iterator[Event]:
        """New pieces."""
        for piece in delta.pieces:
            yield from self._piece(piece)

    def last(self, end: End) -> Iterator[Event]:
        """The end of the last item, and of the response."""
        yield from self._close(_status(end))
        response = self.finished(end)
        yield self._event(f"response.{response['status']}", response=response)

    def finished(self, end: End) -> dict[str, Any]:
        """The response as it ended. A full context is a failure: clients retry what is incomplete, and what
        they have to do is to make room."""
        if end.reason is not StopReason.CONTEXT_FULL:
            return self.object(_status(end), end)
        error = {
            "code": "context_length_exceeded",
            "message": "the context is full; make it shorter and go on",
        }
        return self.object("failed", end, error)

    def failed(self, error: DormouseError) -> Iterator[Event]:
        """The end of a response by an error."""
        if self._open is not None and "status" in self._open:
            self._open["status"] = "incomplete"
        yield from self._close("incomplete")
        message = str(error)
        if isinstance(error, Unavailable):
            # Codex reads the time out of these words.
            message += f". Please try again in {error.retry_after_s}s."
        details = {"code": failure_code(error), "message": message}
        yield self._event("response.failed", response=self.object("failed", None, details))

    def object(
        self, status: str, end: End | None = None, error: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """The response in one piece."""
        body = self._body
        by_length = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": by_length,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": self._output if end is not None or error is not None else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": body.reasoning or {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": usage(end) if end is not None else None,
            "user": body.user,
        }

    def _piece(self, piece: Piece) -> Iterator[Event]:
        match piece:
            case Said(text):
                yield from self._say(text)
            case Thought(text):
                yield from self._think(text)
            case Called(call):
                yield from self._close()
                yield from self._call(call)

    def _say(self, text: str) -> Iterator[Event]:
        if self._open is None or self._open["type"] != "message":
            yield from self._close()
            part = _text_part("")
            item = {"type": "message", "role": "assistant", "status": "in_progress", "content": []}
            yield from self._begin("msg", item)
            yield self._in_part("response.content_part.added", part=part)
            self._item["content"].append(_text_part(""))
        self._item["content"][0]["text"] += text
        yield self._in_part("response.output_text.delta", delta=text, logprobs=[])

    def _think(self, text: str) -> Iterator[Event]:
        if self._open is None or self._open["type"] != "reasoning":
            yield from self._close()
            yield from self._begin("rs", {"type": "reasoning", "summary": [], "content": []})
            part = {"type": "reasoning_text", "text": ""}
            yield self._in_part("response.content_part.added", part=part)
            self._item["content"].append(dict(part))
        self._item["content"][0]["text"] += text
        yield self._in_part("response.reasoning_text.delta", delta=text)

    def _call(self, call: ToolCall) -> Iterator[Event]:
        custom = call.name in self._toolbox.custom
        namespace, name = self._toolbox.origins.get(call.name, (None, call.name))
        item: Item = {"status": "in_progress", "call_id": call.id, "name": name}
        if namespace is not None:
            item["namespace"] = namespace
        if custom:
            given, kind = _freeform(call), "custom_tool_call_input"
            yield from self._begin("ctc", {"type": "custom_tool_call", **item, "input": ""})
            filled = {"input": given}
        else:
            given, kind = call.arguments, "function_call_arguments"
            yield from self._begin("fc", {"type": "function_call", **item, "arguments": ""})
            filled = {"arguments": given}
        yield self._in_item(f"response.{kind}.delta", delta=given)
        yield self._in_item(f"response.{kind}.done", **filled)
        self._item.update(filled)
        yield from self._close()

    @property
    def _item(self) -> Item:
        assert self._open is not None
        return self._open

    def _begin(self, prefix: str, item: Item) -> Iterator[Event]:
        self._open = {"id": new_id(prefix), **item}
        self._output.append(self._open)
        yield self._event(
            "response.output_item.added", output_index=len(self._output) - 1, item=_copy(self._open)
        )

    def _close(self, status: str = "completed") -> Iterator[Event]:
        """End the open item; what is done says all of it again, as clients trust that alone."""
        if self._open is None:
            return
        item = self._open
        if item.get("content"):
            part = item["content"][0]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            extra: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
            yield self._in_part(f"response.{kind}.done", text=part["text"], **extra)
            yield self._in_part("response.content_part.done", part=dict(part))
        if "status" in item:
            item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=_copy(item))
        self._open = None

    def _in_part(self, kind: str, **fields: Any) -> Event:
        return self._in_item(kind, content_index=0, **fields)

    def _in_item(self, kind: str, **fields: Any) -> Event:
        where = {"item_id": self._item["id"], "output_index": len(self._output) - 1}
        return self._event(kind, **where, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1, **fields}


def _status(end: End) -> str:
    """How the last item of a reply ended."""
    is_cut = end.reason in (StopReason.MAX_TOKENS, StopReason.CONTEXT_FULL)
    return "incomplete" if is_cut else "completed"


def failure_code(error: DormouseError) -> str:
    """The code by which Codex decides whether to compact, to wait or to give up."""
    if isinstance(error, ContextLengthExceeded):
        return "context_length_exceeded"
    if isinstance(error, QueueFull | RateLimited):
        return "rate_limit_exceeded"
    return "server_is_overloaded" if isinstance(error, Unavailable) else "server_error"


def usage(end: End) -> dict[str, Any]:
    """This dialect's usage; input tokens include what was found."""
    used = end.usage
    return {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": used.cached_tokens,
            "cache_write_tokens": used.prompt_tokens - used.cached_tokens,
        },
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": end.reasoning_tokens},
        "total_tokens": used.prompt_tokens + used.completion_tokens,
    }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _freeform(call: ToolCall) -> str:
    """The text for a custom tool; whatever the model sent instead is passed on as it is."""
    given = call.parsed()
    text = given.get("input") if isinstance(given, dict) else None
    return text if isinstance(text, str) else call.arguments


def _copy(item: Item) -> Item:
    """An item as it is now: it goes on growing after it was sent."""
    copied = dict(item)
    if "content" in item:
        copied["content"] = [dict(part) for part in item["content"]]
    return copied
