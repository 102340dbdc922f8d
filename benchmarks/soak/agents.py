"""How agents behave: coders with tools, talkers, crews. Each is a task that goes on until it is cancelled."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass, field
from random import Random
from typing import Any

from benchmarks.soak.client import NotAnswered
from benchmarks.soak.mix import Kind, Shape
from benchmarks.soak.replies import Reply
from benchmarks.soak.session import Session
from benchmarks.soak.words import FILES
from benchmarks.soak.world import World
from dormouse.domain.conversation import Message, Role, Tool

_CODER = "You help with the files of one project. Look before you change anything. " + " ".join(
    f"Rule {n}: say what you are going to do before you change file number {n}." for n in range(9)
)
_TALKER = "You are a friendly guide to a small project. Answer in one or two sentences."
_CREW = "You are one of a crew. Read the page, do your own part of the work, and report in one sentence.\n\n"
_CREW_PAGE = 500
_PATH = {
    "type": "object",
    "properties": {"path": {"type": "string", "enum": FILES[:8]}},
    "required": ["path"],
    "additionalProperties": False,
}
TOOLS = tuple(
    Tool(f"{verb}_file", f"{verb.capitalize()} one file of the project. Give its path.", _PATH)
    for verb in ("read", "check", "search", "test")
)
_ASKED = 0.12
"""How often an agent is asked for its word."""


@dataclass
class Agent:
    """One place in the mix, filled by one session after the other."""

    world: World
    kind: Kind
    number: int
    chance: Random = field(init=False)
    _num_sessions: int = 0

    def __post_init__(self) -> None:
        self.chance = self.world.chance(f"{self.kind.name}/{self.number}")

    async def live(self) -> None:
        """Until cancelled. A session in which a request failed is given up; the failure is on record."""
        await asyncio.sleep(self.chance.uniform(0, self.kind.think_s))
        shapes = {Shape.CODER: self._code, Shape.TALKER: self._talk, Shape.CREW: self._send_crew}
        while True:
            try:
                await shapes[self.kind.shape]()
            except NotAnswered:
                await self._think()

    # -- the shapes ----------------------------------------------------------------------------------

    async def _code(self) -> None:
        """Look into files by calls of tools, and say something about each."""
        session = self._begin(_CODER, TOOLS)
        first = f"The word of this project is {session.canary}. {self._piece()}\nWhere would you look first?"
        await self._say(session, Message(Role.USER, first))
        while session.length < self.kind.longest:
            await self._pause(session)
            reply = await self._say(session, Message(Role.USER, "Go on with the next file."), calls=True)
            if not reply.calls:
                continue
            await asyncio.sleep(self.chance.uniform(0.2, 2.0))  # the tool runs
            result = Message(Role.TOOL, self._piece(), call_id=reply.calls[0].id, name=reply.calls[0].name)
            await self._say(session, result)
            await self._perhaps_ask(session)
        await self._end(session)

    async def _talk(self) -> None:
        """Say something and listen, from time to time to a fork."""
        session = self._begin(_TALKER)
        if self.kind.dialect == "agents":
            await self.world.call("POST", "/v1/agents", {"name": session.agent, "system": session.system})
        first = f"My word is {session.canary}. {self._piece()}\nWhat do you think?"
        await self._say(session, Message(Role.USER, first))
        while session.length < self.kind.longest:
            await self._pause(session)
            await self._say(session, Message(Role.USER, f"{self._piece()}\nAnd what of that?"))
            await self._perhaps_ask(session)
            if self.chance.random() < self.kind.fork:
                await self._fork(session)
        await self._end(session)

    async def _send_crew(self) -> None:
        """Subagents at once, all with one system prompt, each with work of its own."""
        page = self.world.words.piece(self.world.chance(f"{self.kind.name}/page"), _CREW_PAGE)
        crew = [self._begin(_CREW + page, name=f"member{n}") for n in range(self.kind.crew)]
        # Drawn here, in order: who is answered first must not decide who draws first.
        works = [(self._piece(), self._piece()) for _ in crew]

        async def work(session: Session, first: str, second: str) -> None:
            await self._say(session, Message(Role.USER, f"Your word is {session.canary}. {first}"))
            await self._say(session, Message(Role.USER, second))

        done = await asyncio.gather(
            *(work(session, *texts) for session, texts in zip(crew, works, strict=True)),
            return_exceptions=True,
        )
        for failure in done:
            if isinstance(failure, BaseException) and not isinstance(failure, NotAnswered):
                raise failure
        for session in crew:
            await self._end(session)
        await self._think()

    # -- what they are made of -----------------------------------------------------------------------

    def _begin(self, system: str, tools: tuple[Tool, ...] = (), name: str = "") -> Session:
        if not name or name == "member0":
            self._num_sessions += 1
        parts = [self.kind.name, str(self.number), str(self._num_sessions), *([name] if name else [])]
        agent = "-".join(parts)
        canary = self.world.canaries.new(self.world.chance(agent), agent)
        session = Session(self.kind, agent, agent, canary, system, tools)
        self.world.sessions.append(session)
        return session

    async def _say(
        self, session: Session, message: Message, *, calls: bool = False, asked: bool = False
    ) -> Reply:
        """One turn: some leave in the middle, come back and ask again."""
        world, kind = self.world, self.kind
        leave_after = self.chance.randint(2, 6) if self.chance.random() < kind.leave else None
        pause_s = self.chance.uniform(0.5, kind.think_s)
        session.messages.append(message)
        ask = session.ask(world.mix.run.reply_tokens, calls=calls)
        recover = (lambda: self._recover(session)) if kind.dialect == "agents" else None
        await self._check_history(session, ask.messages[:-1])
        seen = Reply()
        if leave_after is not None:
            seen = await world.client.ask(
                kind.name, kind.dialect, ask, leave_after=leave_after, recover=recover
            )
            world.canaries.look(session.family, seen.text, asked=False)
            if not seen.is_whole:
                await asyncio.sleep(pause_s)
        found = await recover() if recover and leave_after is not None and not seen.is_whole else None
        reply = seen if seen.is_whole else found
        reply = reply or await world.client.ask(kind.name, kind.dialect, ask, recover=recover)
        if seen.text and reply is not seen:
            world.num_continued += 1
            if not reply.text.startswith(seen.text):
                world.problems.append(f"{session.agent}: {seen.text!r} became {reply.text!r}")
        world.canaries.look(session.family, reply.text, asked=asked)
        session.heard(reply, ask, world.num_lives)
        return reply

    async def _perhaps_ask(self, session: Session) -> None:
        if self.chance.random() < _ASKED:
            question = f"My word, again, is {session.canary}. Repeat the word."
            await self._say(session, Message(Role.USER, question), asked=True)

    async def _fork(self, session: Session) -> None:
        """A fork goes its own way for a turn, and is deleted; its source goes on as if nothing were."""
        name = f"{session.agent}-fork{len(session.turns)}"
        made = await self.world.call("POST", f"/v1/agents/{session.agent}/fork", {"name": name})
        if made is None:
            return
        fork = dataclasses.replace(
            session, agent=name, messages=list(session.messages), turns=list(session.turns)
        )
        await self._say(fork, Message(Role.USER, self._piece()))
        await self.world.call("DELETE", f"/v1/agents/{name}")

    async def _recover(self, session: Session) -> Reply | None:
        """The reply to the last message, if the server has it although its client was not told."""
        kept = await self._kept(session.agent)
        said = _pairs(session.messages)
        if kept[:-1] == said:
            return Reply(kept[-1][1], prompt_tokens=session.length, is_whole=True)
        if kept != said[:-1]:
            self.world.problems.append(f"{session.agent}: history is not what was said: {kept[-2:]}")
        return None

    async def _check_history(self, session: Session, told: Any) -> None:
        """After a restart every reply that a client was told must be in its agent's history."""
        if session.kind.dialect != "agents" or not session.turns:
            return
        if session.turns[-1].life != self.world.num_lives:
            self.world.num_histories += 1
            if await self._kept(session.agent) != _pairs(told):
                self.world.problems.append(f"{session.agent}: history differs after a restart")

    async def _kept(self, agent: str) -> list[tuple[str, str]]:
        found = await self.world.call("GET", f"/v1/agents/{agent}/messages")
        return [(row["role"], row["content"]) for row in (found or {"data": []})["data"]]

    async def _end(self, session: Session) -> None:
        if self.chance.random() < self.kind.delete:
            await self.world.call("DELETE", f"/v1/agents/{session.agent}")

    async def _pause(self, session: Session) -> None:
        """Think; some put their agent to sleep meanwhile, and a few say when they will be back."""
        naps, hints = self.chance.random() < self.kind.nap, self.chance.random() < 0.5
        await self._think()
        if not naps:
            return
        path = f"/v1/agents/{session.agent}"
        await self.world.call("POST", f"{path}/sleep")
        await asyncio.sleep(self.kind.nap * self.world.seconds)
        if hints:
            await self.world.call("POST", f"{path}/wake")

    async def _think(self) -> None:
        mean = self.kind.think_s
        await asyncio.sleep(min(self.chance.expovariate(1 / mean), 3 * mean))

    def _piece(self) -> str:
        return self.world.words.piece(self.chance, self.chance.randint(*self.kind.brings))


def _pairs(messages: Any) -> list[tuple[str, str]]:
    return [(message.role.value, message.text) for message in messages]
