"""OpenAI's dialect: chat completions, completions and models."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Header
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from dormouse.api import errors, sse
from dormouse.api.call import call_of
from dormouse.api.caller import caller_of
from dormouse.api.logprobs import chat_logprobs, completion_logprobs
from dormouse.api.reply import Sink, events, gather
from dormouse.api.schema import ChatBody, CompletionBody, GenerationBody
from dormouse.domain.agents import check_agent_name
from dormouse.domain.requests import Event, Failed, Finished, Request, TextDelta, TokenLogprob, Usage
from dormouse.models.host import ModelHost
from dormouse.models.served import ServedModel

_CLIENT_GONE = 499
"""nginx's number for an answer that nobody is there to read."""

AgentHeader = Annotated[str | None, Header(alias="x-agent-id")]


class _Dialect:
    """How chat completions and completions differ on the wire."""

    def __init__(self, served: ServedModel, body: GenerationBody, *, chat: bool, logprobs: bool) -> None:
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._served = served
        self._chat = chat
        self._logprobs = logprobs
        self._includes_usage = body.includes_usage
        self._created = int(time.time())
        self._offset = 0

    def whole(self, collected: list[Event]) -> dict[str, Any]:
        """The body of a reply that was not streamed."""
        deltas = [event for event in collected if isinstance(event, TextDelta)]
        finished = collected[-1]
        assert isinstance(finished, Finished)
        text = "".join(delta.text for delta in deltas)
        logprobs = tuple(entry for delta in deltas for entry in delta.logprobs)
        choice: dict[str, Any] = {"index": 0, "finish_reason": finished.reason.value}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice["logprobs"] = self._render(logprobs)
        return self._object("", [choice], usage(finished.usage))

    def first(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [self._chunk({"role": "assistant", "content": ""}, None)] if self._chat else []

    def chunk(self, delta: TextDelta) -> dict[str, Any]:
        """New text in a stream."""
        logprobs = self._render(delta.logprobs) if delta.logprobs else None
        return self._chunk({"content": delta.text}, None, logprobs, delta.text)

    def last(self, finished: Finished) -> list[dict[str, Any]]:
        """What a stream ends with."""
        chunks = [self._chunk({}, finished.reason.value)]
        if self._includes_usage:
            chunks.append(self._object(".chunk", [], usage(finished.usage)))
        return chunks

    def _chunk(
        self,
        delta: dict[str, Any],
        reason: str | None,
        logprobs: dict[str, Any] | None = None,
        text: str = "",
    ) -> dict[str, Any]:
        content = {"delta": delta} if self._chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": reason}
        return self._object(".chunk", [choice], None)

    def _object(
        self, suffix: str, choices: list[dict[str, Any]], used: dict[str, Any] | None
    ) -> dict[str, Any]:
        body = {
            "id": self.id,
            "object": f"chat.completion{suffix}" if self._chat else "text_completion",
            "created": self._created,
            "model": self._served.name,
            "system_fingerprint": self._served.fingerprint,
            "choices": choices,
        }
        # In a stream that ends with usage, every other chunk says that it has none.
        says_usage = used is not None or (suffix and self._includes_usage)
        return body | {"usage": used} if says_usage else body

    def _render(self, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        if self._chat:
            return chat_logprobs(self._served.chat, logprobs)
        rendered, self._offset = completion_logprobs(self._served.chat, logprobs, self._offset)
        return rendered


def usage(used: Usage) -> dict[str, Any]:
    """OpenAI's usage; `cached_tokens` are part of `prompt_tokens`. Where they came from is ours."""
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": used.cached_tokens,
            "memory_tokens": used.memory_tokens,
            "disk_tokens": used.disk_tokens,
        },
    }


def router(host: ModelHost) -> APIRouter:
    """The routes of this dialect for one model."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/chat/completions")
    async def chat_completions(body: ChatBody, http: HttpRequest, x_agent_id: AgentHeader = None) -> Response:
        """Continue a conversation."""
        served = await host.serve(body.model)
        prompt = await asyncio.to_thread(
            served.chat.render, body.rendered(), **(body.chat_template_kwargs or {})
        )
        top = (body.top_logprobs or 0) if body.logprobs else None
        dialect = _Dialect(served, body, chat=True, logprobs=top is not None)
        limit = body.max_completion_tokens or body.max_tokens
        return await _answer(served, dialect, body, prompt, limit, top, x_agent_id, http)

    @routes.post("/completions")
    async def completions(
        body: CompletionBody, http: HttpRequest, x_agent_id: AgentHeader = None
    ) -> Response:
        """Continue a text."""
        served = await host.serve(body.model)
        prompt = body.single_prompt()
        tokens = await asyncio.to_thread(served.chat.encode, prompt) if isinstance(prompt, str) else prompt
        dialect = _Dialect(served, body, chat=False, logprobs=body.logprobs is not None)
        # OpenAI's default of this older route; a chat may run to the end of its context.
        limit = body.max_tokens or 16
        return await _answer(served, dialect, body, tokens, limit, body.logprobs, x_agent_id, http)

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The served model."""
        return {"object": "list", "data": [_model(host.served)]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        return _model(await host.serve(name))

    return routes


async def _answer(
    served: ServedModel,
    dialect: _Dialect,
    body: GenerationBody,
    prompt: list[int],
    limit: int | None,
    top_logprobs: int | None,
    agent_header: str | None,
    http: HttpRequest,
) -> Response:
    """Submit, then answer in one piece or as a stream."""
    sink = Sink()
    room = max(1, served.engine.max_length - len(prompt))
    request = Request(
        id=dialect.id,
        prompt=tuple(prompt),
        sampling=body.sampling(
            max_tokens=min(limit or room, room),
            top_logprobs=top_logprobs,
            vocab_size=served.vocab_size,
        ),
        sink=sink,
        agent=_agent(agent_header, body.prompt_cache_key),
        tenant=caller_of(http).tenant,
        deadline_s=served.deadline_s,
    )
    request = call_of(http).observe(request, served.name)
    served.engine.submit(request)
    if body.stream:
        return sse.stream(_frames(served, dialect, request, sink))
    collected = await gather(served.engine, request, sink, http)
    if collected is None:
        return Response(status_code=_CLIENT_GONE)
    return JSONResponse(dialect.whole(collected))


async def _frames(
    served: ServedModel, dialect: _Dialect, request: Request, sink: Sink
) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(events(served.engine, request, sink)) as stream:
        for chunk in dialect.first():
            yield sse.data(chunk)
        async for event in stream:
            if event is None:
                yield sse.PING
            elif isinstance(event, TextDelta):
                yield sse.data(dialect.chunk(event))
            elif isinstance(event, Failed):
                # The status is long sent; an error event makes the SDKs raise, where a mere end of
                # the stream would pass for a whole reply.
                yield sse.data(errors.envelope(event.error))
            else:
                for chunk in dialect.last(event):
                    yield sse.data(chunk)
                yield sse.DONE


def _agent(header: str | None, cache_key: str | None) -> str | None:
    """The agent's name: the header, else the prompt cache key, else anonymous."""
    name = _utf8(header) if header else cache_key
    return check_agent_name(name) if name else None


def _utf8(header: str) -> str:
    """Header bytes are handed over as Latin-1; clients that send more than ASCII send UTF-8."""
    try:
        return header.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return header


def _model(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "dormouse",
        "context_length": served.engine.max_length,
    }
