"""The objects of a chat completion: whole, and chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dormouse.api.answer import Answer, Delta, End
from dormouse.api.chat_schema import ChatBody
from dormouse.api.choices import total
from dormouse.api.logprobs import chat_logprobs
from dormouse.api.openai_objects import FINISH, Envelope, usage
from dormouse.domain.conversation import Called, Piece, Said, Thought, ToolCall
from dormouse.models.served import ServedModel

_WHOLE, _CHUNK = "chat.completion", "chat.completion.chunk"


class ChatRendering:
    """The objects of one request's reply."""

    def __init__(self, served: ServedModel, body: ChatBody) -> None:
        self.envelope = Envelope(served, "chatcmpl", includes_usage=body.includes_usage)
        self._served = served
        self._logprobs = bool(body.logprobs)
        self._num_calls: dict[int, int] = {}

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        """The body of a reply that was not streamed."""
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return self.envelope.whole(_WHOLE, choices, self.usage([answer.end for answer in answers]))

    def usage(self, ends: list[End]) -> dict[str, Any]:
        """What all choices used."""
        return usage(total(ends, 1), sum(end.reasoning_tokens for end in ends))

    def first(self, index: int) -> dict[str, Any]:
        """What a choice of a stream begins with."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """New pieces of a choice in a stream; the log probabilities come with the first of them."""
        logprobs = chat_logprobs(self._served.chat, delta.logprobs) if self._logprobs else None
        parts = [part for piece in delta.pieces for part in self._parts(index, piece)]
        for part in parts or [{"content": ""}]:
            yield self._chunk(index, part, logprobs)
            logprobs = None

    def end(self, index: int, end: End) -> dict[str, Any]:
        """What a choice of a stream ends with."""
        return self._chunk(index, {}, None, FINISH[end.reason])

    def last(self, ends: list[End]) -> list[dict[str, Any]]:
        """What a stream ends with, when all its choices have."""
        return self.envelope.last(_CHUNK, self.usage(ends))

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        reply = answer.end.reply
        content = reply.text if reply.text or not reply.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.calls:
            message["tool_calls"] = [render_call(call) for call in reply.calls]
        logprobs = tuple(entry for delta in answer.deltas for entry in delta.logprobs)
        return {
            "index": index,
            "finish_reason": FINISH[answer.end.reason],
            "message": message,
            "logprobs": chat_logprobs(self._served.chat, logprobs) if self._logprobs else None,
        }

    def _parts(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        match piece:
            case Said(text):
                yield {"content": text}
            case Thought(text):
                yield {"reasoning_content": text}
            case Called(call):
                number = self._num_calls.get(index, 0)
                self._num_calls[index] = number + 1
                # Clients append what a later delta says: id and name come once.
                empty = render_call(replace(call, arguments=""))
                yield {"tool_calls": [{"index": number, **empty}]}
                yield {"tool_calls": [{"index": number, "function": {"arguments": call.arguments}}]}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.envelope.chunk(_CHUNK, [choice])


def render_call(call: ToolCall) -> dict[str, Any]:
    """A call as messages have it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
