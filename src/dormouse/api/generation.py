"""One reply, as every dialect gets it: a conversation or a plain prompt in, pieces of the answer out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass, replace
from typing import TypeVar

from fastapi import Request as HttpRequest

from dormouse.api.answer import Answer, AnswerSoFar, Delta, End, StopReason
from dormouse.api.ask import Ask
from dormouse.api.services import Services
from dormouse.api.sink import PING_INTERVAL_S, Sink
from dormouse.domain.agents import AgentId
from dormouse.domain.blocks import Namespace
from dormouse.domain.constraint import Constraint
from dormouse.domain.conversation import Conversation, Message, Piece, Said
from dormouse.domain.errors import (
    AgentNotFound,
    DormouseError,
    EngineStalled,
    InvalidRequest,
    PromptStalled,
    StoreError,
)
from dormouse.domain.model_spec import cache_namespace
from dormouse.domain.requests import (
    Failed,
    Finished,
    FinishReason,
    Priority,
    Request,
    Started,
    TextDelta,
    Usage,
)
from dormouse.models import grammars
from dormouse.models.decisions import Divergence, decided, divergence
from dormouse.models.prompting import Prompt, Prompter
from dormouse.models.reply_parser import ReplyParser
from dormouse.models.served import ServedModel

T = TypeVar("T")

log = logging.getLogger(__name__)

LATE_S = 5.0
"""The engine ends a request at its deadline. If nothing came of it so long after that, it never will."""

CLIENT_GONE = 499
"""nginx's number for an answer that nobody is there to read."""


class Generation:
    """A submitted request and the answer to it. Its `events` are read once; whoever began it closes it."""

    def __init__(self, services: Services, served: ServedModel, ask: Ask, prepared: _Prepared) -> None:
        """Submits. Raises RateLimited, and what `Engine.submit` raises."""
        self._services = services
        self._served = served
        self._ask = ask
        self._prepared = prepared
        self._answer = AnswerSoFar()
        self._sink = Sink()
        self._submitted = time.monotonic()
        self._due = self._submitted + served.deadline_s + served.engine.options.answer_s + LATE_S
        self._ended = False
        room = max(1, served.engine.max_length - len(prepared.tokens))
        limit = room if ask.max_tokens is None else min(ask.max_tokens, room)
        sampling = ask.sampling
        self._request = Request(
            id=ask.id,
            prompt=prepared.tokens,
            sampling=replace(sampling, max_tokens=limit, min_tokens=min(sampling.min_tokens, limit)),
            sink=self._sink,
            agent=ask.identity.agent,
            tenant=ask.tenant,
            deadline_s=served.deadline_s,
            constraint=prepared.constraint,
            priority=prepared.priority,
        )
        if ask.call is not None:
            self._request = ask.call.observe(self._request, served.name)
        try:
            served.engine.submit(self._request)
        except DormouseError as error:
            if ask.call is not None:
                ask.call.replies[-1].refuse(error)
            raise

    @classmethod
    async def begin(cls, services: Services, served: ServedModel, ask: Ask) -> Generation:
        """Render, tokenize, compile what constrains the answer, and submit.

        Raises InvalidRequest for what can never be answered, PromptStalled for what is not made in time,
        RateLimited, and what `Engine.submit` raises.
        """
        prepared = await services.prompts.run(ask.tenant, _prepare, services, served, ask)
        constraint = await _constraint(services, served, ask, prepared)
        return cls(services, served, ask, replace(prepared, constraint=constraint))

    @property
    def served(self) -> ServedModel:
        """The model that answers."""
        return self._served

    @property
    def prompt_keys(self) -> tuple[bytes, ...]:
        """Names of the conversation after each of its messages; empty for a plain prompt."""
        return self._prepared.prompt.keys if self._prepared.prompt else ()

    async def started(self) -> Usage:
        """What of the prompt was found, as soon as that is known; after a while without knowing, nothing."""
        event = await self._sink.peek(PING_INTERVAL_S)
        if isinstance(event, Started):
            return event.usage
        return Usage(len(self._prepared.tokens), 0, 0, 0)

    async def events(self) -> AsyncGenerator[Delta | End | None, None]:
        """Deltas, None in every long silence, and the End. Raises the error of a reply that failed, and
        EngineStalled when the engine itself does not answer."""
        first_token_at: float | None = None
        shown_at = time.monotonic()
        while not self._ended:
            patience = max(0.0, min(PING_INTERVAL_S, self._due - time.monotonic()))
            event = await self._sink.next(patience)
            if event is None and time.monotonic() >= self._due:
                raise self._stalled()
            self._ended = isinstance(event, Finished | Failed)
            match event:
                case None:
                    shown_at = time.monotonic()
                    yield None
                case TextDelta(text, logprobs):
                    first_token_at = first_token_at or time.monotonic()
                    pieces = self._push(text)
                    if pieces or logprobs:
                        shown_at = time.monotonic()
                        yield Delta(self._answer.add(pieces), logprobs)
                    elif time.monotonic() - shown_at >= PING_INTERVAL_S:
                        # A call is shown when it is whole, which may take long.
                        shown_at = time.monotonic()
                        yield None
                case Failed(error):
                    raise error
                case Finished():
                    pieces = self._finish()
                    if pieces:
                        yield Delta(self._answer.add(pieces))
                    waited = (first_token_at or time.monotonic()) - self._submitted
                    end = self._end(event, waited)
                    if self._ask.identity.agent is not None:
                        await self.settle()
                    yield end

    async def collect(self) -> Answer:
        """All of the answer. Raises the error of a reply that failed."""
        deltas: list[Delta] = []
        async with contextlib.aclosing(self.events()) as events:
            async for event in events:
                if isinstance(event, End):
                    return Answer(tuple(deltas), event)
                if event is not None:
                    deltas.append(event)
        raise AssertionError("a generation ended without its end")

    async def settle(self) -> None:
        """With `--durability sync`: wait until what was kept of the reply beside its blocks is on disk."""
        options = self._served.engine.options
        if options.sync and not await asyncio.to_thread(self._services.store.flush, options.sync_timeout_s):
            log.warning("request %s is answered but not all that is kept of it is on disk yet", self._ask.id)

    async def aclose(self) -> None:
        """Nobody reads on: stop computing what is not complete."""
        if not self._ended:
            self._ended = True
            self._served.engine.abort(self._request.id)

    def _stalled(self) -> EngineStalled:
        busy_s = self._served.engine.busy_s
        log.error("request %s: the engine has been at one step for %.0f s", self._request.id, busy_s)
        return EngineStalled(
            f"no answer within {self._served.deadline_s:g} s: the engine has been at one step for "
            f"{busy_s:.0f} s; restart the server if it stays so"
        )

    def _push(self, text: str) -> list[Piece]:
        parser = self._prepared.parser
        if parser is not None:
            return parser.push(text)
        return [Said(text)] if text else []

    def _finish(self) -> list[Piece]:
        return self._prepared.parser.finish() if self._prepared.parser is not None else []

    def _end(self, finished: Finished, waited_s: float) -> End:
        reply = self._answer.message()
        self._note(finished, reply, waited_s)
        num_thought = self._num_thought(finished) if reply.reasoning else 0
        reason = self._reason(finished, reply)
        stop = finished.stop if reason is StopReason.STOP_STRING else None
        return End(reason, finished.usage, stop, num_thought, reply)

    def _reason(self, finished: Finished, reply: Message) -> StopReason:
        if finished.reason is FinishReason.LENGTH:
            used = finished.usage.prompt_tokens + finished.usage.completion_tokens
            wanted = self._ask.max_tokens
            is_full = used >= self._served.engine.max_length
            by_context = is_full and (wanted is None or finished.usage.completion_tokens < wanted)
            return StopReason.CONTEXT_FULL if by_context else StopReason.MAX_TOKENS
        if reply.calls:
            return StopReason.CALLS
        return StopReason.END if finished.stop is None else StopReason.STOP_STRING

    def _note(self, finished: Finished, reply: Message, waited_s: float) -> None:
        """Remember the reply as it was generated, and why its prompt was found or not."""
        prepared, ask = self._prepared, self._ask
        # What a stop string cut has tokens that nobody was shown.
        if prepared.prompt is not None and finished.tokens and finished.stop is None:
            prepared.prompter.remember(prepared.prompt, reply, finished.tokens)
        if ask.identity.agent is not None:
            decision = decided(
                self._served.name, prepared.history, finished.usage, waited_s, prepared.divergence
            )
            self._services.decisions.note(ask.tenant, ask.identity.agent, decision)

    def _num_thought(self, finished: Finished) -> int:
        """About so many of the generated tokens were thought: by the share of the shown text that was."""
        call_texts = sum(len(called.call.arguments) for called in self._answer.calls)
        shown = len(self._answer.said) + call_texts
        thought = len(self._answer.thought)
        return round(len(finished.tokens) * thought / (thought + shown))


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What worker threads make of an `Ask`. `prompt` and `parser` are None for a plain prompt; `history` is
    the agent's before this request."""

    tokens: tuple[int, ...]
    prompter: Prompter
    prompt: Prompt | None = None
    parser: ReplyParser | None = None
    constraint: Constraint | None = None
    history: tuple[int, ...] = ()
    divergence: Divergence | None = None
    priority: Priority = Priority.MAIN


def prompter_of(services: Services, served: ServedModel, tenant: str) -> Prompter:
    """What makes prompts for one tenant of a model."""
    return Prompter(served.chat, services.replies, tenant, _namespace(served, tenant))


def _namespace(served: ServedModel, tenant: str) -> Namespace:
    runtime = served.engine.runtime
    return cache_namespace(runtime.spec, runtime.cache, tenant)


def _prepare(services: Services, served: ServedModel, ask: Ask) -> _Prepared:
    prompter = prompter_of(services, served, ask.tenant)
    history: tuple[int, ...] = ()
    if ask.identity.agent is not None:
        # One that is new, or whose history was damaged, has nothing to be compared with.
        with contextlib.suppress(AgentNotFound, StoreError):
            agent = AgentId(ask.tenant, ask.identity.agent, _namespace(served, ask.tenant))
            history = tuple(services.store.history(agent))
    prepared = _Prepared((), prompter, history=history, priority=_priority(services, ask))
    if not isinstance(ask.source, Conversation):
        return replace(prepared, tokens=ask.source, divergence=divergence(history, ask.source))
    prompt = prompter.prepare(ask.source)
    return replace(
        prepared,
        tokens=prompt.tokens,
        prompt=prompt,
        parser=served.chat.reply_parser(ask.source, prompt.text),
        divergence=divergence(history, prompt.tokens),
    )


async def _constraint(
    services: Services, served: ServedModel, ask: Ask, prepared: _Prepared
) -> Constraint | None:
    """What the answer must keep to. Compiled on threads apart from the prompts', so that a grammar that
    takes seconds holds up nobody who has none."""
    source, prompt = ask.source, prepared.prompt
    if not isinstance(source, Conversation) or prompt is None or not grammars.is_bound(source):
        return None
    try:
        return await services.grammars.run(
            ask.tenant, served.chat.constraint, source, prompt.text, ask.tenant
        )
    except PromptStalled as error:
        if not error.has_begun:
            raise
        if grammars.is_strict(source):
            raise InvalidRequest(f"{error}, or leave 'strict' out") from error
        log.warning("a reply goes on without its grammar: %s", error)
        return None


def _priority(services: Services, ask: Ask) -> Priority:
    """What is asked beside a conversation stands behind it, once there is one."""
    if ask.identity.main is not None:
        with contextlib.suppress(AgentNotFound):
            services.store.agent(ask.tenant, ask.identity.main)
            return Priority.SIDE
    return ask.identity.priority


async def unless_gone(http: HttpRequest, work: Awaitable[T]) -> T | None:
    """The result of `work`; None, after cancelling it, when the client goes away first.

    The body must have been read.
    """
    doing = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await doing if doing.done() else None
    finally:
        doing.cancel()
        gone.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _disconnected(http: HttpRequest) -> None:
    """Return when the client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
