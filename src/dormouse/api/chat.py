"""OpenAI's chat completions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from dormouse.api import errors, sse
from dormouse.api.call import call_of
from dormouse.api.caller import CallerParam
from dormouse.api.chat_schema import ChatBody
from dormouse.api.choices import Answer, Choices, total
from dormouse.api.generation import CLIENT_GONE, Ask, Delta, End, unless_gone
from dormouse.api.identity import identify
from dormouse.api.logprobs import chat_logprobs
from dormouse.api.openai_objects import FINISH, Envelope, usage
from dormouse.api.services import Services
from dormouse.domain.conversation import Called, Piece, Said, Thought, ToolCall
from dormouse.domain.errors import DormouseError
from dormouse.models.served import ServedModel

_WHOLE, _CHUNK = "chat.completion", "chat.completion.chunk"


def router(services: Services) -> APIRouter:
    """The route of this dialect."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/chat/completions")
    async def chat_completions(body: ChatBody, http: HttpRequest, caller: CallerParam) -> Response:
        """Continue a conversation."""
        served = await services.host.serve(body.model)
        top = (body.top_logprobs or 0) if body.logprobs else None
        samplings = body.samplings(top_logprobs=top, vocab_size=served.vocab_size)
        conversation = body.conversation()
        identity = identify(http.headers, body.hints(has_tools=bool(conversation.tools)))
        rendering = _Rendering(served, body)
        ask = Ask(
            rendering.envelope.id,
            conversation,
            samplings[0],
            body.limit,
            identity,
            caller.tenant,
            call_of(http),
        )
        choices = await Choices.begin(services, served, [ask, *ask.others(samplings[1:])])
        if body.stream:
            return sse.stream(_frames(choices, rendering, body))
        answers = await unless_gone(http, choices.whole())
        await choices.aclose()
        if answers is None:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(rendering.whole(answers))

    return routes


class _Rendering:
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

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        reply = answer.end.reply
        content = reply.text if reply.text or not reply.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.calls:
            message["tool_calls"] = [_call(call) for call in reply.calls]
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
                empty = _call(replace(call, arguments=""))
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


async def _frames(choices: Choices, rendering: _Rendering, body: ChatBody) -> AsyncGenerator[str, None]:
    ends: list[End] = []
    async with contextlib.aclosing(choices), contextlib.aclosing(choices.events()) as events:
        for index in range(body.n or 1):
            yield sse.data(rendering.first(index))
        try:
            async for index, event in events:
                if event is None:
                    yield sse.PING
                elif isinstance(event, End):
                    ends.append(event)
                    yield sse.data(rendering.end(index, event))
                else:
                    for chunk in rendering.delta(index, event):
                        yield sse.data(chunk)
        except DormouseError as error:
            # The status is long sent; an error event makes the SDKs raise, where a mere end of the
            # stream would pass for a whole reply.
            yield sse.data(errors.envelope(error))
            return
        for chunk in rendering.envelope.last(_CHUNK, rendering.usage(ends)):
            yield sse.data(chunk)
        yield sse.DONE


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
