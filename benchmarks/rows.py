"""What a step costs by its rows: `python -m benchmarks.rows [--context 1500]`. One JSON row.

`ratio` is to a step of one row. `engine/drafts.py` has its constants from here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from dormouse.bench.client import random_prompt
from dormouse.domain.plan import Chunk, Plan
from dormouse.models.runtimes import load_runtime
from dormouse.models.sources import resolve
from dormouse.settings import Settings

ROWS = (1, 2, 3, 4, 6, 8, 9, 12, 16, 24, 32)
ROUNDS = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=1500)
    context = parser.parse_args().context
    settings = Settings(arena_tokens=context + 256)
    with ThreadPoolExecutor(1) as loader:
        folder = resolve(settings.model, settings.models_dir)
        runtime = loader.submit(load_runtime, settings, folder).result()
    tokens = tuple(random_prompt(0, context + max(ROWS), runtime.spec.vocab_size))

    def run(start: int, end: int, num_logits: int) -> float:
        pages = tuple(range(-(-end // settings.block_size)))
        begin = time.perf_counter()
        runtime.forward(Plan((Chunk(tokens[start:end], start, pages, num_logits),)))
        return time.perf_counter() - begin

    for start in range(0, context, 512):
        run(start, min(context, start + 512), 0)
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(ROUNDS):
        for rows in ROWS:
            seconds[rows].append(run(context, context + rows, rows))
    medians = {rows: statistics.median(values) for rows, values in seconds.items()}
    result = {
        "context": context,
        "ms": {rows: round(1e3 * median, 2) for rows, median in medians.items()},
        "ratio": {rows: round(median / medians[1], 2) for rows, median in medians.items()},
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
