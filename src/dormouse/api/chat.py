"""OpenAI's chat completions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from dormouse.api import errors, sse
from dormouse.api.answer import End
from dormouse.api.ask import Ask
from dormouse.api.bodies import JsonRoute
from dormouse.api.call import call_of
from dormouse.api.caller import CallerParam
from dormouse.api.chat_rendering import ChatRendering
from dormouse.api.chat_schema import ChatBody
from dormouse.api.choices import Choices
from dormouse.api.generation import CLIENT_GONE, unless_gone
from dormouse.api.identity import identify
from dormouse.api.services import Services
from dormouse.domain.errors import DormouseError


def router(services: Services) -> APIRouter:
    """The route of this dialect."""
    routes = APIRouter(prefix="/v1", route_class=JsonRoute)

    @routes.post("/chat/completions")
    async def chat_completions(body: ChatBody, http: HttpRequest, caller: CallerParam) -> Response:
        """Continue a conversation."""
        conversation = body.conversation()
        # What can only be refused is refused before a model is swapped in for it.
        served = await services.host.serve(body.model, caller.tenant)
        top = (body.top_logprobs or 0) if body.logprobs else None
        samplings = body.samplings(top_logprobs=top, vocab_size=served.vocab_size)
        identity = identify(http.headers, body.hints(has_tools=bool(conversation.tools)))
        rendering = ChatRendering(served, body)
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
            return sse.stream(_frames(choices, rendering, body), choices)
        async with contextlib.aclosing(choices):
            answers = await unless_gone(http, choices.whole())
        if answers is None:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(rendering.whole(answers))

    return routes


async def _frames(choices: Choices, rendering: ChatRendering, body: ChatBody) -> AsyncGenerator[str, None]:
    ends: list[End] = []
    async with contextlib.aclosing(choices.events()) as events:
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
        for chunk in rendering.last(ends):
            yield sse.data(chunk)
        yield sse.DONE
