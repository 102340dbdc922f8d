"""`agents`: more agents than fit into the memory for KV, one turn each in rotation."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

from benchmarks.compare.fleet import Fleet
from benchmarks.compare.rows import Board, percentile
from benchmarks.compare.scale import Scale
from benchmarks.compare.server import Server
from benchmarks.compare.texts import Texts
from benchmarks.compare.traffic import Ask, Reply, RequestFailed

FIRST, ROTATION, WARM = "first contact", "rotation", "asked again at once"
TTFT, P50, P95 = "time to first token", "time to first token, p50", "time to first token, p95"
SPEED = "generated tokens per second of the whole run"


@dataclass
class Agent:
    """What one agent has said and heard so far, at one server."""

    name: str
    said: str
    num_turns: int = 0

    def ask(self, max_tokens: int, limit_s: float) -> Ask:
        """Its whole conversation, as clients of a stateless API send it."""
        return Ask(self.said, max_tokens, limit_s, agent=self.name)

    def heard(self, reply: Reply) -> None:
        """The reply is part of the conversation from now on."""
        self.said += reply.text
        self.num_turns += 1


class Rotation:
    """The agents of every server, and their turns."""

    def __init__(self, fleet: Fleet, texts: Texts, scale: Scale) -> None:
        self.board = Board("agents")
        self._fleet = fleet
        self._scale = scale
        contexts = [texts.fresh(f"Agent {number}", scale.agent_context) for number in range(scale.agents)]
        turns = range(scale.rotations)
        self._says = [
            [texts.more(f"{i}.{turn}", scale.turn_prompt) for turn in turns] for i in range(scale.agents)
        ]
        self.agents = {
            server.name: [Agent(f"agent-{i}", context) for i, context in enumerate(contexts)]
            for server in fleet.of("agents")
        }
        self._spent = dict.fromkeys(self.agents, 0.0)
        self._generated = dict.fromkeys(self.agents, 0)

    def run(self) -> Board:
        """First contact, then the rotations, and at the end the last agent again, which is still there."""
        for number in range(self._scale.rotations + 1):
            case = FIRST if number == 0 else ROTATION
            if number:
                self.board.carry(FIRST, case)
            turns = functools.partial(self._turns, number)
            self._fleet.rounds(self.board, case, 1, self._scale.agents_limit_s, turns)
        self.board.carry(FIRST, WARM)
        self._fleet.rounds(self.board, WARM, 3, self._scale.case_limit_s, self._again)
        for name, spent in self._spent.items():
            if spent:
                self.board.add(name, ROTATION, SPEED, "tokens/s", self._generated[name] / spent)
            if waited := self.board.samples(name, ROTATION, TTFT):
                self.board.add(name, ROTATION, P50, "s", percentile(waited, 0.5))
                self.board.add(name, ROTATION, P95, "s", percentile(waited, 0.95))
        return self.board

    def _turns(self, number: int, server: Server, _: int) -> None:
        """One turn of each agent. Raises RequestFailed when the server's time for this workload is over."""
        name, limit_s = server.name, self._scale.agents_limit_s
        case = ROTATION if number else FIRST
        for done, agent in enumerate(self.agents[name]):
            if self._spent[name] > limit_s:
                raise RequestFailed(f"got to {done} of {self._scale.agents} agents within its {limit_s:g} s")
            if number:
                agent.said += self._says[done][number - 1]
            started = time.monotonic()
            reply = server.client.complete(agent.ask(self._scale.turn_reply, self._scale.request_limit_s))
            self._spent[name] += time.monotonic() - started
            self._generated[name] += reply.completion_tokens
            agent.heard(reply)
            self.board.add(name, case, TTFT, "s", reply.ttft_s)

    def _again(self, server: Server, _: int) -> None:
        """The prompt of the agent that spoke last: the best that a cache in memory can do."""
        agent = self.agents[server.name][-1]
        server.client.complete(agent.ask(1, self._scale.request_limit_s))
        reply = server.client.complete(agent.ask(1, self._scale.request_limit_s))
        self.board.add(server.name, WARM, TTFT, "s", reply.ttft_s)
