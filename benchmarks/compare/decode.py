"""`decode`: streams that all generate, at contexts that were read before."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.compare.fleet import Fleet
from benchmarks.compare.rows import Board
from benchmarks.compare.scale import Scale
from benchmarks.compare.server import Server
from benchmarks.compare.texts import Texts
from benchmarks.compare.traffic import Ask, Reply, RequestFailed

SPEED = "tokens per second of all streams"


def decode(fleet: Fleet, texts: Texts, scale: Scale) -> Board:
    """Every batch at both contexts."""
    board = Board("decode")
    for context, batches in (scale.decode_short, scale.decode_long):
        prompts = [texts.fresh(f"Decode {context}, {stream}", context) for stream in range(max(batches))]
        for before, batch in zip((0, *batches), batches, strict=False):
            case = case_of(batch, context)
            board.carry(case_of(before, context), case)
            _measure_batch(fleet, board, scale, case, prompts[:batch], before)
    return board


def case_of(batch: int, context: int) -> str:
    """How rows call a batch at a context."""
    return f"{batch} at {context}"


def _measure_batch(
    fleet: Fleet, board: Board, scale: Scale, case: str, prompts: list[str], num_read: int
) -> None:
    def read(server: Server, _: int) -> None:
        """The prompts that no smaller batch had, one at a time: reading is not what is measured."""
        started = time.monotonic()
        for prompt in prompts[num_read:]:
            if time.monotonic() > started + 2 * scale.case_limit_s:
                raise RequestFailed(f"reading its contexts takes over {2 * scale.case_limit_s:g} s")
            server.client.complete(Ask(prompt, 1, scale.request_limit_s))

    def measure(server: Server, _: int) -> None:
        asks = [Ask(prompt, scale.decode_tokens, scale.request_limit_s) for prompt in prompts]
        board.add(server.name, case, SPEED, "tokens/s", tokens_per_s(server.client.together(asks)))

    for server in fleet.of(board.workload):
        if not board.failure(server.name, case):
            fleet.measure(board, case, server, 0, read)
    fleet.rounds(board, case, scale.rounds, scale.case_limit_s, measure)


def tokens_per_s(replies: Sequence[Reply]) -> float:
    """Tokens of all streams per second while all of them generate.

    Streams of a server that answers one after the other are never together: then all that they
    generated counts, from the first token of any to the last of all. Raises RequestFailed for a reply
    without text.
    """
    if not all(reply.times for reply in replies):
        raise RequestFailed("answered with no text")
    start = max(reply.times[0] for reply in replies)
    end = min(reply.times[-1] for reply in replies)
    if end <= start:
        start = min(reply.times[0] for reply in replies)
        end = max(reply.times[-1] for reply in replies)
    return sum(reply.tokens_between(start, end) for reply in replies) / (end - start)
