"""`mixed`: a long prompt arrives while others decode; how long do they wait for their next token?"""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from benchmarks.compare.fleet import Fleet
from benchmarks.compare.rows import Board
from benchmarks.compare.scale import Scale
from benchmarks.compare.server import Server
from benchmarks.compare.texts import Texts
from benchmarks.compare.traffic import Ask, Reply, RequestFailed

GAP, STEP, RATIO = "longest gap", "normal step", "longest gap in normal steps"
TTFT = "time to first token of the long prompt"
_SETTLING_S = 3.0
"""Of decoding alone, before the long prompt arrives: what a normal step takes is measured in it."""
_STREAM_TOKENS = 6000
_STREAM_CONTEXT = 64


def mixed(fleet: Fleet, texts: Texts, scale: Scale) -> Board:
    """One case: `mixed_streams` streams and one prompt of `mixed_prompt` tokens."""
    board = Board("mixed")
    case = f"{scale.mixed_prompt} into {scale.mixed_streams}"
    rounds = range(scale.mixed_rounds)
    prompts = [texts.fresh(f"Mixed {number}", scale.mixed_prompt) for number in rounds]
    streams = [
        [texts.fresh(f"Stream {number}.{i}", _STREAM_CONTEXT) for i in range(scale.mixed_streams)]
        for number in rounds
    ]

    def measure(server: Server, number: int) -> None:
        replies, arrived, long = _collide(server, streams[number], prompts[number], scale.request_limit_s)
        step, gap = gaps(replies, arrived, long.ended)
        board.add(server.name, case, GAP, "ms", 1000 * gap)
        board.add(server.name, case, STEP, "ms", 1000 * step)
        board.add(server.name, case, RATIO, "", gap / step)
        board.add(server.name, case, TTFT, "s", long.ttft_s)

    fleet.rounds(board, case, scale.mixed_rounds, scale.case_limit_s, measure)
    return board


def _collide(
    server: Server, streams: list[str], prompt: str, limit_s: float
) -> tuple[list[Reply], float, Reply]:
    """The streams' replies, when the long prompt was sent, and its reply."""
    over = threading.Event()
    asks = [Ask(text, _STREAM_TOKENS, limit_s + _SETTLING_S + 30, until=over) for text in streams]
    with ThreadPoolExecutor(len(asks)) as pool:
        running = [pool.submit(server.client.complete, ask) for ask in asks]
        try:
            time.sleep(_SETTLING_S)
            arrived = time.monotonic()
            long = server.client.complete(Ask(prompt, 1, limit_s))
        finally:
            over.set()  # the streams end at their next token
        return [future.result() for future in running], arrived, long


def gaps(replies: list[Reply], arrived: float, ended: float) -> tuple[float, float]:
    """A normal step, the median gap before `arrived`, and the longest gap that overlaps the long prompt.

    Raises RequestFailed when the streams did not decode before it.
    """
    normal = [
        after - before for reply in replies for before, after in pairwise(reply.times) if after <= arrived
    ]
    disturbed = [
        after - before
        for reply in replies
        for before, after in pairwise(reply.times)
        if after > arrived and before < ended
    ]
    if not normal or not disturbed:
        raise RequestFailed("its streams did not decode at the same time as each other and the long prompt")
    return statistics.median(normal), max(disturbed)
