"""`restart`: the agents of `agents` after their server was stopped and started again."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

from benchmarks.compare.agents import TTFT, Agent, Rotation
from benchmarks.compare.fleet import Fleet
from benchmarks.compare.rows import Board
from benchmarks.compare.scale import Scale
from benchmarks.compare.server import Server
from benchmarks.compare.traffic import RequestFailed

WAKE, BY_HAND, START = "wake", "slot restored by hand", "start"
SLOT_NBYTES = "bytes of a saved slot"
_BY_HAND_AGENTS = 3
"""Agents whose slots are saved and restored: the last ones, of which the server may still have something."""


def restart(fleet: Fleet, scale: Scale, rotation: Rotation) -> Board:
    """Stop every server, start it again, and ask for each agent's next token.

    Where a server can save a slot to a file by hand, that is done for the last agents before the stop;
    what is measured after it is the restore and the first token together.
    """
    board = Board("restart")
    for server in fleet.of(board.workload):
        agents = [agent for agent in rotation.agents[server.name] if agent.num_turns]
        if not agents or server.absence:
            board.note(server.name, WAKE, server.absence or "held no agent before the restart")
            continue
        sleep = _Sleep(board, scale, agents)
        fleet.measure(board, BY_HAND, server, 0, sleep.save_slots)
        server.stop()
        fleet.start(server)
        if server.absence is None:
            board.add(server.name, START, "ready to serve", "s", server.ready_s)
        if not board.failure(server.name, BY_HAND):
            fleet.measure(board, BY_HAND, server, 0, sleep.restore_slots)
        fleet.measure(board, WAKE, server, 0, sleep.wake)
        fleet.say(f"restart, {server.name}: done")
    return board


class _Sleep:
    """One server's agents before and after its restart."""

    def __init__(self, board: Board, scale: Scale, agents: Sequence[Agent]) -> None:
        self._board = board
        self._scale = scale
        self._agents = agents

    def save_slots(self, server: Server, _: int) -> None:
        """Have each of the last agents in the slot, and save it."""
        if server.peer.slots is None:
            raise RequestFailed("saves no conversation by hand")
        save = functools.partial(server.client.post, server.peer.slots.save, limit_s=self._limit_s)
        for agent in self._agents[-_BY_HAND_AGENTS:]:
            server.client.complete(agent.ask(1, self._limit_s))
            saved = save({"filename": agent.name})
            self._board.add(server.name, BY_HAND, SLOT_NBYTES, "bytes", saved["n_written"])

    def restore_slots(self, server: Server, _: int) -> None:
        """Each of the saved agents: restore, then the first token."""
        assert server.peer.slots is not None
        for agent in self._agents[-_BY_HAND_AGENTS:]:
            started = time.monotonic()
            server.client.post(server.peer.slots.restore, {"filename": agent.name}, self._limit_s)
            reply = server.client.complete(agent.ask(1, self._limit_s))
            self._board.add(server.name, BY_HAND, TTFT, "s", reply.started + reply.ttft_s - started)

    def wake(self, server: Server, _: int) -> None:
        """Agents one after the other, as many as the server's time for a case allows."""
        started, limit_s = time.monotonic(), self._scale.case_limit_s
        for done, agent in enumerate(self._agents):
            if time.monotonic() > started + limit_s:
                raise RequestFailed(f"got to {done} of {len(self._agents)} agents within its {limit_s:g} s")
            reply = server.client.complete(agent.ask(1, self._limit_s))
            self._board.add(server.name, WAKE, TTFT, "s", reply.ttft_s)

    @property
    def _limit_s(self) -> float:
        return self._scale.request_limit_s
