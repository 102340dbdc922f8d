"""OpenAI's older completions: a text or tokens go on."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from dormouse.api import errors, sse
from dormouse.api.answer import Answer, Delta, End
from dormouse.api.ask import Ask
from dormouse.api.bodies import JsonRoute
from dormouse.api.call import call_of
from dormouse.api.caller import CallerParam
from dormouse.api.choices import Choices, total
from dormouse.api.generation import CLIENT_GONE, unless_gone
from dormouse.api.identity import identify
from dormouse.api.logprobs import completion_logprobs
from dormouse.api.openai_objects import FINISH, Envelope, usage
from dormouse.api.schema import CompletionBody
from dormouse.api.services import Services
from dormouse.domain.conversation import Said
from dormouse.domain.errors import DormouseError
from dormouse.models.served import ServedModel

_KIND = "text_completion"
_DEFAULT_TOKENS = 16
"""OpenAI's default of this route; a chat may run to the end of its context."""


def router(services: Services) -> APIRouter:
    """The route of this dialect."""
    routes = APIRouter(prefix="/v1", route_class=JsonRoute)

    @routes.post("/completions")
    async def completions(body: CompletionBody, http: HttpRequest, caller: CallerParam) -> Response:
        """Continue a text."""
        served = await services.host.serve(body.model, caller.tenant)
        prompts = await services.prompts.run(caller.tenant, _encode, served, body.prompts())
        identity = identify(http.headers, body.hints())
        rendering = _Rendering(served, body, len(prompts))
        limit = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        samplings = body.samplings(top_logprobs=body.logprobs, vocab_size=served.vocab_size)
        reply_id = rendering.envelope.id
        ask = Ask(reply_id, prompts[0], samplings[0], limit, identity, caller.tenant, call_of(http))
        asks = [ask, *ask.others(samplings[1:])]
        for prompt in prompts[1:]:
            asks += replace(ask, source=prompt).others(samplings)
        choices = await Choices.begin(services, served, asks)
        if body.stream:
            return sse.stream(_frames(choices, rendering), choices)
        async with contextlib.aclosing(choices):
            answers = await unless_gone(http, choices.whole())
        if answers is None:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(rendering.whole(answers))

    return routes


class _Rendering:
    """The objects of one request's reply."""

    def __init__(self, served: ServedModel, body: CompletionBody, num_prompts: int) -> None:
        self.envelope = Envelope(served, "cmpl", includes_usage=body.includes_usage)
        self._served = served
        self._logprobs = body.logprobs is not None
        self._num_prompts = num_prompts
        self._offsets: dict[int, int] = {}

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        """The body of a reply that was not streamed."""
        choices = []
        for index, answer in enumerate(answers):
            logprobs = tuple(entry for delta in answer.deltas for entry in delta.logprobs)
            merged = Delta((Said(answer.end.reply.text),), logprobs)
            choices.append(self._choice(index, merged, FINISH[answer.end.reason]))
        return self.envelope.whole(_KIND, choices, self.usage([answer.end for answer in answers]))

    def usage(self, ends: list[End]) -> dict[str, Any]:
        """What all choices used."""
        return usage(total(ends, self._num_prompts))

    def delta(self, index: int, delta: Delta) -> dict[str, Any]:
        """New text of a choice in a stream."""
        return self.envelope.chunk(_KIND, [self._choice(index, delta, None)])

    def end(self, index: int, end: End) -> dict[str, Any]:
        """What a choice of a stream ends with."""
        return self.envelope.chunk(_KIND, [self._choice(index, Delta(()), FINISH[end.reason])])

    def _choice(self, index: int, delta: Delta, reason: str | None) -> dict[str, Any]:
        text = "".join(piece.text for piece in delta.pieces if isinstance(piece, Said))
        logprobs = None
        if self._logprobs and (delta.logprobs or reason is None):
            offset = self._offsets.get(index, 0)
            logprobs, self._offsets[index] = completion_logprobs(self._served.chat, delta.logprobs, offset)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


async def _frames(choices: Choices, rendering: _Rendering) -> AsyncGenerator[str, None]:
    ends: dict[int, End] = {}
    async with contextlib.aclosing(choices.events()) as events:
        try:
            async for index, event in events:
                if event is None:
                    yield sse.PING
                elif isinstance(event, End):
                    ends[index] = event
                    yield sse.data(rendering.end(index, event))
                else:
                    yield sse.data(rendering.delta(index, event))
        except DormouseError as error:
            yield sse.data(errors.envelope(error))
            return
        in_order = [ends[index] for index in sorted(ends)]
        for chunk in rendering.envelope.last(_KIND, rendering.usage(in_order)):
            yield sse.data(chunk)
        yield sse.DONE


def _encode(served: ServedModel, prompts: list[str | list[int]]) -> list[tuple[int, ...]]:
    return [tuple(served.chat.encode(p) if isinstance(p, str) else p) for p in prompts]
