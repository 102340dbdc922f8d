"""`density`: what an agent takes in memory and on disk, and a server that holds a hundred asleep."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import httpx

from benchmarks.compare.agents import Rotation
from benchmarks.compare.fleet import Fleet, Say
from benchmarks.compare.peers import Peer
from benchmarks.compare.restart import BY_HAND, SLOT_NBYTES
from benchmarks.compare.rows import Board
from benchmarks.compare.scale import Scale
from benchmarks.compare.server import Server
from benchmarks.compare.texts import Texts
from benchmarks.compare.traffic import Ask, RequestFailed
from benchmarks.resident import Resident

AGENTS, ASLEEP = "agents", "asleep"
PER_RAM, PER_DISK = "agents per GiB of memory", "agents per GiB of disk"
READY, RESIDENT, BEYOND = "ready to serve", "resident", "resident beyond weights and arena"
WEIGHTS, ARENA = "weights", "arena, touched"
PRIVATE, LIBRARIES = "beyond, private to the process", "beyond, libraries"
_NO_SLEEP = "its agents do not sleep: what leaves its memory is gone"
_NBYTES_PER_GIB = 2**30
_MB = 1e6


def density(fleet: Fleet, scale: Scale, rotation: Rotation, restart: Board) -> Board:
    """Agents of `agent_context` tokens per GiB: in memory by the bytes of a token, on disk as found."""
    board = Board("density")
    slots = {row.server: row for row in restart.rows() if row.metric == SLOT_NBYTES}
    for server in fleet.of("density"):
        peer = server.peer
        per_agent = peer.kv_token_nbytes * scale.agent_context
        board.add(server.name, AGENTS, PER_RAM, "agents", _NBYTES_PER_GIB / per_agent)
        if row := slots.get(server.name):
            board.add(
                server.name, AGENTS, PER_DISK, "agents", *(_NBYTES_PER_GIB / size for size in row.samples)
            )
            board.note(server.name, AGENTS, f"on disk only by hand, as in `restart`: {BY_HAND}")
        elif peer.store is None:
            board.note(server.name, AGENTS, _NO_SLEEP)
        elif server.absence:
            board.note(server.name, AGENTS, server.absence)
        else:
            total = disk_nbytes(server.folder / peer.store)
            board.add(
                server.name,
                AGENTS,
                PER_DISK,
                "agents",
                _NBYTES_PER_GIB * len(_awake(rotation, server)) / total,
            )
    return board


def asleep(
    board: Board,
    peers: Sequence[Peer],
    folder: Path,
    texts: Texts,
    scale: Scale,
    say: Say,
) -> None:
    """Make `asleep` agents, restart, and look at the process before anybody asks for one."""
    for peer in peers:
        if peer.store is None:
            board.note(peer.name, ASLEEP, _NO_SLEEP)
            continue
        server = Server(peer, folder, dataclasses.replace(scale.tight, streams=1))
        try:
            _make_agents(server, texts, scale)
            for _ in range(scale.starts):
                server.start()
                if server.absence:
                    break
                _look(board, server)
                server.stop()
        except RequestFailed as error:
            board.note(peer.name, ASLEEP, str(error))
        finally:
            server.stop()
        if server.absence:
            board.note(peer.name, ASLEEP, server.absence)
        say(f"density, {peer.name}: done")


def _make_agents(server: Server, texts: Texts, scale: Scale) -> None:
    server.start()
    if server.absence:
        return
    for number in range(scale.asleep):
        prompt = texts.fresh(f"Sleeper {number}", scale.asleep_context)
        server.client.complete(Ask(prompt, 1, scale.request_limit_s, agent=f"sleeper-{number}"))
    server.stop()


def _look(board: Board, server: Server) -> None:
    """What is resident, and what of it is left without the weights and the arena's touched pages."""
    state = httpx.get(f"{server.url}/health", timeout=30).json()
    if used := state["engine"]["pages_used"]:
        raise RequestFailed(f"{used} pages of its arena are in use, though nobody asked for anything")
    (process,) = server.family()
    parts = Resident.of(process.pid).beyond(state["memory"]["weights_nbytes"] / 2**20)
    for metric, part in (
        (RESIDENT, "resident_mib"),
        (WEIGHTS, "weights_mib"),
        (ARENA, "arena_mib"),
        (BEYOND, "beyond_mib"),
        (PRIVATE, "beyond_anonymous_mib"),
        (LIBRARIES, "beyond_file_backed_mib"),
    ):
        board.add(server.name, ASLEEP, metric, "MB", parts[part] * 2**20 / _MB)
    board.add(server.name, ASLEEP, READY, "s", server.ready_s)


def disk_nbytes(folder: Path) -> int:
    """What the files below `folder` take on disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _awake(rotation: Rotation, server: Server) -> list[str]:
    return [agent.name for agent in rotation.agents[server.name] if agent.num_turns]
