"""`prefill`: prompts that nobody has seen, one at a time, to the first token."""

from __future__ import annotations

from benchmarks.compare.fleet import Fleet
from benchmarks.compare.rows import Board
from benchmarks.compare.scale import Scale
from benchmarks.compare.server import Server
from benchmarks.compare.texts import Texts
from benchmarks.compare.traffic import Ask

TTFT, SPEED = "time to first token", "prompt tokens per second"


def prefill(fleet: Fleet, texts: Texts, scale: Scale) -> Board:
    """Every size in turn; who fails at a size is not asked for a longer one."""
    board = Board("prefill")
    _warm_up(fleet, board, texts, scale)
    for before, size in zip((None, *scale.prefill), scale.prefill, strict=False):
        case = str(size)
        board.carry(str(before), case)
        prompts = [texts.fresh(f"Prefill {size}, {number}", size) for number in range(scale.rounds)]

        def measure(server: Server, number: int, case: str = case, prompts: list[str] = prompts) -> None:
            reply = server.client.complete(Ask(prompts[number], 1, scale.request_limit_s))
            board.add(server.name, case, TTFT, "s", reply.ttft_s)
            board.add(server.name, case, SPEED, "tokens/s", texts.count(prompts[number]) / reply.ttft_s)

        fleet.rounds(board, case, scale.rounds, scale.case_limit_s, measure)
    return board


def _warm_up(fleet: Fleet, board: Board, texts: Texts, scale: Scale) -> None:
    """What a server does at its first request only belongs to its start, not to a prompt."""
    prompt = texts.fresh("Warming up", min(256, scale.prefill[0]))

    def ask(server: Server, _: int) -> None:
        server.client.complete(Ask(prompt, 4, scale.request_limit_s))

    for server in fleet.of(board.workload):
        fleet.measure(board, str(scale.prefill[0]), server, 0, ask)
