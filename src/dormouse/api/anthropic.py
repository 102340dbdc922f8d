"""Anthropic's dialect: messages and token counts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from dormouse.api import anthropic_stream, errors, sse
from dormouse.api.answer import End
from dormouse.api.anthropic_schema import MessagesBody, PromptBody
from dormouse.api.anthropic_stream import MessageStream
from dormouse.api.ask import Ask
from dormouse.api.bodies import JsonRoute
from dormouse.api.call import call_of
from dormouse.api.caller import CallerParam
from dormouse.api.generation import CLIENT_GONE, Generation, prompter_of, unless_gone
from dormouse.api.identity import identify
from dormouse.api.misses import Miss, Misses, Sent
from dormouse.api.services import Services
from dormouse.domain.errors import DormouseError

_PATH = "/v1/messages"


def router(services: Services) -> APIRouter:
    """The routes of this dialect."""
    routes = APIRouter(prefix=_PATH, route_class=JsonRoute)
    misses = Misses()

    @routes.post("")
    async def messages(body: MessagesBody, http: HttpRequest, caller: CallerParam) -> Response:
        """Continue a conversation."""
        conversation = body.conversation()
        # What can only be refused is refused before a model is swapped in for it.
        served = await services.host.serve(body.model, caller.tenant)
        message_id = anthropic_stream.new_message_id()
        ask = Ask(
            message_id,
            conversation,
            body.sampling(),
            body.max_tokens,
            identify(http.headers, body.hints()),
            caller.tenant,
            call_of(http),
        )
        generation = await Generation.begin(services, served, ask)
        sent = Sent(body.model, conversation, generation.prompt_keys)
        why = misses.why(caller.tenant, body.previous_message_id, sent)
        misses.remember(caller.tenant, message_id, sent)
        if body.stream:
            frames = _frames(generation, message_id, body.model, why, call_of(http).id)
            return sse.stream(frames, generation)
        async with contextlib.aclosing(generation):
            answer = await unless_gone(http, generation.collect())
        if answer is None:
            return Response(status_code=CLIENT_GONE)
        diagnostics = why.render(answer.end.usage) if why else None
        block_size = served.engine.runtime.cache.block_size
        return JSONResponse(
            anthropic_stream.message(message_id, body.model, answer.end, diagnostics, block_size)
        )

    @routes.post("/count_tokens")
    async def count_tokens(body: PromptBody, caller: CallerParam) -> dict[str, int]:
        """The exact length of the prompt, template and tools included."""
        served = await services.host.serve(body.model, caller.tenant)
        prompter = prompter_of(services, served, caller.tenant)
        prompt = await services.prompts.run(caller.tenant, prompter.prepare, body.conversation())
        return {"input_tokens": len(prompt.tokens)}

    return routes


async def _frames(
    generation: Generation, message_id: str, model: str, why: Miss | None, request_id: str
) -> AsyncGenerator[str, None]:
    stream = MessageStream(message_id, model, generation.served.engine.runtime.cache.block_size)
    async with contextlib.aclosing(generation.events()) as events:
        used = await generation.started()
        for frame in sse.events(stream.first(used, why.render(used) if why else None)):
            yield frame
        try:
            async for event in events:
                if event is None:
                    yield sse.event("ping", {"type": "ping"})
                    continue
                rendered = stream.last(event) if isinstance(event, End) else stream.delta(event)
                for frame in sse.events(rendered):
                    yield frame
        except DormouseError as error:
            # The status is long sent; an error event makes the SDKs raise, where a mere end of the
            # stream would pass for a dropped connection.
            yield sse.event("error", errors.envelope(error, _PATH, request_id))
