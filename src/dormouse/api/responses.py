"""OpenAI's Responses: items in, items out, and a past that the server keeps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable
from itertools import chain
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from dormouse.api import sse
from dormouse.api.answer import End
from dormouse.api.ask import Ask
from dormouse.api.bodies import JsonRoute
from dormouse.api.call import call_of
from dormouse.api.caller import CallerParam
from dormouse.api.generation import CLIENT_GONE, Generation, prompter_of, unless_gone
from dormouse.api.identity import identify
from dormouse.api.response_store import ResponseStore, StoredResponse
from dormouse.api.responses_schema import Item, ResponsesBody
from dormouse.api.responses_stream import ResponseStream
from dormouse.api.services import Services
from dormouse.domain.errors import ContextLengthExceeded, DormouseError, QueueFull, RateLimited
from dormouse.models.served import ServedModel

_PATH = "/v1/responses"


def router(services: Services) -> APIRouter:
    """The routes of this dialect."""
    routes = APIRouter(prefix=_PATH, route_class=JsonRoute)
    stored = ResponseStore(services.store)

    @routes.post("")
    async def create(body: ResponsesBody, http: HttpRequest, caller: CallerParam) -> Response:
        """Answer an input, after a stored response where one is named."""
        body.check()
        past = await asyncio.to_thread(stored.past, caller.tenant, body.previous_response_id)
        toolbox = body.toolbox()
        conversation = body.conversation_after(past, toolbox)
        # What can only be refused is refused before a model is swapped in for it.
        served = await services.host.serve(body.model, caller.tenant)
        stream = ResponseStream(body, toolbox)
        ask = Ask(
            stream.id,
            conversation,
            body.sampling(),
            body.limit,
            identify(http.headers, body.hints()),
            caller.tenant,
            call_of(http),
        )
        reply = _Reply(stored, caller.tenant, body, stream)
        if body.stream:
            return sse.stream(reply.frames(await reply.begin(services, served, ask)), reply)
        generation = await Generation.begin(services, served, ask)
        async with contextlib.aclosing(generation):
            finished = await unless_gone(http, reply.whole(generation))
        return Response(status_code=CLIENT_GONE) if finished is None else JSONResponse(finished)

    @routes.post("/input_tokens")
    async def input_tokens(body: ResponsesBody, caller: CallerParam) -> dict[str, Any]:
        """The exact length of a prompt."""
        served = await services.host.serve(body.model, caller.tenant)
        past = await asyncio.to_thread(stored.past, caller.tenant, body.previous_response_id)
        conversation = body.conversation_after(past, body.toolbox())
        prompter = prompter_of(services, served, caller.tenant)
        prompt = await services.prompts.run(caller.tenant, prompter.prepare, conversation)
        return {"object": "response.input_tokens", "input_tokens": len(prompt.tokens)}

    @routes.get("/{id}")
    async def show(id: str, caller: CallerParam) -> dict[str, Any]:
        """A stored response."""
        return (await asyncio.to_thread(stored.get, caller.tenant, id)).response

    @routes.get("/{id}/input_items")
    async def input_items(id: str, caller: CallerParam) -> dict[str, Any]:
        """What a stored response answered."""
        items = (await asyncio.to_thread(stored.get, caller.tenant, id)).input
        ids = [item.get("id") for item in items]
        page = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
        return {"object": "list", "data": items, "has_more": False, **page}

    @routes.post("/{id}/cancel")
    async def cancel(id: str, caller: CallerParam) -> dict[str, Any]:
        """Nothing runs in the background here, so a stored response is complete and stays as it is."""
        return (await asyncio.to_thread(stored.get, caller.tenant, id)).response

    @routes.delete("/{id}")
    async def delete(id: str, caller: CallerParam) -> dict[str, Any]:
        """Forget a stored response."""
        await asyncio.to_thread(stored.delete, caller.tenant, id)
        return {"id": id, "object": "response", "deleted": True}

    return routes


class _Reply:
    """One response on its way to the client, and into the store."""

    def __init__(
        self,
        stored: ResponseStore,
        tenant: str,
        body: ResponsesBody,
        stream: ResponseStream,
    ) -> None:
        self._stored = stored
        self._tenant = tenant
        self._body = body
        self._stream = stream
        self._generation: Generation | None = None

    async def begin(self, services: Services, served: ServedModel, ask: Ask) -> Generation | DormouseError:
        """Submit. A context that is too long, and a crowd, are told in the stream: there clients know what to
        do, where a status of 400 or 429 ends their turn."""
        try:
            self._generation = await Generation.begin(services, served, ask)
        except (ContextLengthExceeded, QueueFull, RateLimited) as error:
            return error
        return self._generation

    async def aclose(self) -> None:
        """Nobody reads on."""
        if self._generation is not None:
            await self._generation.aclose()

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The response in one piece."""
        answer = await generation.collect()
        # What is told in one piece has no events; its items are made all the same.
        told = [*map(self._stream.delta, answer.deltas), self._stream.last(answer.end)]
        for _ in chain.from_iterable(told):
            pass
        return await self._keep(generation, answer.end)

    async def frames(self, begun: Generation | DormouseError) -> AsyncGenerator[str, None]:
        """The response as a stream."""
        stream = self._stream
        for frame in sse.events(stream.first()):
            yield frame
        if isinstance(begun, DormouseError):
            for frame in sse.events(stream.failed(begun)):
                yield frame
            return
        async with contextlib.aclosing(begun.events()) as events:
            try:
                async for event in events:
                    if event is None:
                        yield sse.event("response.in_progress", stream.alive())
                        continue
                    if isinstance(event, End):
                        last = list(stream.last(event))
                        await self._keep(begun, event)
                        for frame in sse.events(last):
                            yield frame
                        continue
                    for frame in sse.events(stream.delta(event)):
                        yield frame
            except DormouseError as error:
                for frame in sse.events(stream.failed(error)):
                    yield frame

    async def _keep(self, generation: Generation, end: End) -> dict[str, Any]:
        """The finished response, which is stored before its client is told, unless it is not to be."""
        response = self._stream.finished(end)
        if self._body.store is not False:
            document = StoredResponse(response, _with_ids(self._body.items()))
            await asyncio.to_thread(self._stored.put, self._tenant, document)
            await generation.settle()
        return response


def _with_ids(items: Iterable[Item]) -> list[Item]:
    return [{"id": f"item_{index}", **item} for index, item in enumerate(items)]
