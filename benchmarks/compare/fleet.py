"""All servers at once: started, paused while it is another's turn, measured in rounds, ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compare.peers import KVBudget, Peer
from benchmarks.compare.rows import Board
from benchmarks.compare.server import Server
from benchmarks.compare.traffic import RequestFailed, TookTooLong

Say = Callable[[str], None]
Measure = Callable[[Server, int], None]
"""Measures a server in the round of this number, and adds to a board. Raises RequestFailed."""


@dataclass(frozen=True)
class Fleet:
    """Servers that are up and paused, or absent."""

    servers: Sequence[Server]
    say: Say

    @classmethod
    @contextmanager
    def open(cls, peers: Sequence[Peer], folder: Path, budget: KVBudget, say: Say) -> Iterator[Fleet]:
        """Start all of `peers` with the same `budget`, each alone, and end them however it goes."""
        fleet = cls([Server(peer, folder, budget) for peer in peers], say)
        try:
            for server in fleet.servers:
                fleet.start(server)
            yield fleet
        finally:
            for server in fleet.servers:
                server.stop()

    def start(self, server: Server) -> None:
        """Start one and pause it."""
        server.start()
        server.pause()
        self.say(f"{server.name}: {server.absence or f'ready after {server.ready_s:.1f} s'}")

    def of(self, workload: str) -> list[Server]:
        """The servers that take part in a workload."""
        return [server for server in self.servers if not server.peer.only or workload in server.peer.only]

    def rounds(self, board: Board, case: str, rounds: int, limit_s: float, measure: Measure) -> None:
        """Measure a case of all servers in turn, `rounds` times.

        A server that failed is noted and left out from then on; one that spent `limit_s` on the case
        keeps the samples that it has.
        """
        spent = {server.name: 0.0 for server in self.servers}
        for number in range(rounds):
            for server in self.of(board.workload):
                if board.failure(server.name, case) or spent[server.name] > limit_s:
                    continue
                started = time.monotonic()
                self.measure(board, case, server, number, measure)
                spent[server.name] += time.monotonic() - started
                took = f"{time.monotonic() - started:.1f} s"
                self.say(f"{board.workload} {case}, round {number + 1}, {server.name}: {took}")

    def measure(self, board: Board, case: str, server: Server, number: int, measure: Measure) -> None:
        """Give one server its turn; what goes wrong becomes the case's note."""
        if server.absence:
            board.note(server.name, case, server.absence)
            return
        with server.turn():
            try:
                measure(server, number)
            except RequestFailed as error:
                board.note(server.name, case, str(error))
                self.say(f"{board.workload} {case}, {server.name}: {error}")
                if isinstance(error, TookTooLong):
                    server.settle()
