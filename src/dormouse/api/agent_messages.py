"""Conversations that the server keeps: only the new turn travels. And why an agent was found or not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from dormouse.api import errors, sse
from dormouse.api.agent_rows import iso
from dormouse.api.answer import End
from dormouse.api.ask import Ask
from dormouse.api.bodies import JsonRoute
from dormouse.api.call import call_of
from dormouse.api.caller import CallerParam
from dormouse.api.chat_rendering import ChatRendering
from dormouse.api.chat_schema import ChatBody, MessageBody
from dormouse.api.generation import CLIENT_GONE, Generation, unless_gone
from dormouse.api.identity import Identity
from dormouse.api.services import Services
from dormouse.api.transcripts import Transcripts
from dormouse.domain.agents import check_agent_name
from dormouse.domain.errors import AgentNotFound, DormouseError, InvalidRequest
from dormouse.models.decisions import Decision
from dormouse.models.served import ServedModel


class TurnBody(ChatBody):
    """A chat completion's body, of which `messages` are the new ones only. What the agent was made with, its
    system prompt, tools and settings, holds unless the turn says otherwise."""

    model: str = ""
    messages: Annotated[list[MessageBody], Field(min_length=1)]


def router(services: Services, prefix: str) -> APIRouter:
    """The routes; to be included before those that take any path for a name."""
    routes = APIRouter(prefix=prefix, route_class=JsonRoute)
    transcripts = Transcripts(services.store)

    @routes.post("/{name:path}/messages")
    async def append(name: str, body: TurnBody, http: HttpRequest, caller: CallerParam) -> Response:
        """Say something to an agent, and have its reply."""
        turn = _Turn(services, transcripts, caller.tenant, check_agent_name(name), body)
        if body.n not in (None, 1):
            raise InvalidRequest("an agent gives one reply; leave n out", param="n")
        generation = await turn.begin(http)
        if body.stream:
            return sse.stream(turn.frames(generation), turn)
        try:
            finished = await unless_gone(http, turn.whole(generation))
        finally:
            await turn.aclose()
        return Response(status_code=CLIENT_GONE) if finished is None else JSONResponse(finished)

    @routes.get("/{name:path}/messages")
    async def messages(name: str, caller: CallerParam) -> dict[str, Any]:
        """What was said so far, as chat messages."""
        found = await asyncio.to_thread(transcripts.read, caller.tenant, check_agent_name(name))
        return {"object": "list", "data": found.messages}

    @routes.get("/{name:path}/why")
    async def why(name: str, caller: CallerParam) -> dict[str, Any]:
        """What the agent's last request found of its past, where it left it, and what that cost."""
        await asyncio.to_thread(services.store.agent, caller.tenant, check_agent_name(name))
        decision = services.decisions.last(caller.tenant, name)
        served = services.host.served
        return {"agent": name, "decision": None if decision is None else _render(decision, served)}

    return routes


class _Turn:
    """One turn: the transcript before it, its reply, and the transcript after it."""

    def __init__(
        self,
        services: Services,
        transcripts: Transcripts,
        tenant: str,
        name: str,
        body: TurnBody,
    ) -> None:
        self._services = services
        self._transcripts = transcripts
        self._tenant = tenant
        self._name = name
        self._body = body
        self._held = contextlib.AsyncExitStack()

    async def begin(self, http: HttpRequest) -> Generation:
        """Take the agent's turn and submit. Raises what either raises."""
        try:
            return await self._begin(http)
        except BaseException:
            await self._held.aclose()
            raise

    async def _begin(self, http: HttpRequest) -> Generation:
        turns = self._services.turns
        self._turn = await self._held.enter_async_context(turns.take(self._tenant, self._name))
        self._before = await asyncio.to_thread(self._transcripts.read, self._tenant, self._name)
        model = self._body.model or self._before.model or self._services.host.served.name
        self._served = await self._services.host.serve(model, self._tenant)
        body = self._before.apply(self._body, self._served.name)
        self._rendering = ChatRendering(self._served, body)
        sampling = body.samplings(
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            vocab_size=self._served.vocab_size,
        )[0]
        ask = Ask(
            self._rendering.envelope.id,
            body.conversation(),
            sampling,
            body.limit,
            Identity(self._name),
            self._tenant,
            call_of(http),
        )
        if not self._before.model:
            # From here on the server keeps the conversation, also when this first turn is cut.
            start = replace(self._before, model=self._served.name)
            await asyncio.to_thread(self._transcripts.write, self._tenant, self._name, start)
        generation = await Generation.begin(self._services, self._served, ask)
        self._held.push_async_callback(generation.aclose)
        return generation

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The reply in one piece."""
        answer = await generation.collect()
        await self._keep(answer.end)
        await generation.settle()
        return self._rendering.whole([answer])

    async def frames(self, generation: Generation) -> AsyncGenerator[str, None]:
        """The reply as a stream of chat chunks."""
        rendering = self._rendering
        async with contextlib.aclosing(generation.events()) as events:
            yield sse.data(rendering.first(0))
            try:
                async for event in events:
                    if event is None:
                        yield sse.PING
                    elif isinstance(event, End):
                        await self._keep(event)
                        await generation.settle()
                        for chunk in (rendering.end(0, event), *rendering.last([event])):
                            yield sse.data(chunk)
                        yield sse.DONE
                    else:
                        for chunk in rendering.delta(0, event):
                            yield sse.data(chunk)
            except DormouseError as error:
                yield sse.data(errors.envelope(error))

    async def aclose(self) -> None:
        """Give the turn back, and stop what is not complete."""
        await self._held.aclose()

    async def _keep(self, end: End) -> None:
        """The turn is said and answered: both are kept before the client is told. Raises AgentNotFound."""
        if self._turn.is_void:
            raise AgentNotFound(f"agent '{self._name}' was deleted while it replied")
        after = self._before.after(self._body, end.reply, self._served.name)
        await asyncio.to_thread(self._transcripts.write, self._tenant, self._name, after)


def _render(decision: Decision, served: ServedModel) -> dict[str, Any]:
    used, where = decision.usage, decision.divergence
    diverged = None
    if where is not None and decision.model == served.name:  # whose tokens are they?
        diverged = {
            "at_token": where.at,
            "remembered": served.chat.decode(where.remembered),
            "received": served.chat.decode(where.received),
        }
    return {
        "at": iso(decision.at),
        "model": decision.model,
        "history_tokens": decision.history_tokens,
        "prompt_tokens": used.prompt_tokens,
        "matched_tokens": used.cached_tokens,
        "memory_tokens": used.memory_tokens,
        "disk_tokens": used.disk_tokens,
        "computed_tokens": decision.computed_tokens,
        "first_token_s": round(decision.wait_s, 4),
        "diverged": diverged,
    }
