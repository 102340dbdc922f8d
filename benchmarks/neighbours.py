"""A decode step while other programs compute: `python -m benchmarks.neighbours [--batch 1,4]`. One JSON row.

The machine of someone with five agents also runs what the agents start: compilers, tests. Here it is loops
that do nothing, stopped and let go again in turns, so that a slow moment of the machine hits all cases.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from dormouse.bench.client import random_prompt
from dormouse.bench.machine import describe
from dormouse.bench.speed import spread
from dormouse.domain.plan import Chunk, Plan
from dormouse.models.sources import resolve
from dormouse.models.stack import load_runtime
from dormouse.settings import Settings

CONTEXT = 256
TURN_S, ROUNDS = 1.0, 7
_LIFETIME_S = 600
_BUSY = f"import time\nend = time.time() + {_LIFETIME_S}\nwhile time.time() < end: pass"


@contextmanager
def neighbours(count: int) -> Iterator[list[int]]:
    """Process ids of programs that compute without end, stopped for now."""
    programs = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        for program in programs:
            os.kill(program.pid, signal.SIGSTOP)
        yield [program.pid for program in programs]
    finally:
        for program in programs:
            program.kill()
            program.wait()


def measure(batches: list[int], most: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of a step, by batch and by the number of neighbours."""
    settings = Settings(arena_tokens=(max(batches) + 1) * (CONTEXT + 128))
    with ThreadPoolExecutor(1) as loader:
        folder = resolve(settings.model, settings.models_dir)
        runtime = loader.submit(load_runtime, settings, folder).result()
    tokens = tuple(random_prompt(0, CONTEXT + 1, runtime.spec.vocab_size))
    num_pages = -(-(CONTEXT + 1) // settings.block_size)
    tables = [tuple(range(n * num_pages, (n + 1) * num_pages)) for n in range(max(batches))]
    for table in tables:
        runtime.forward(Plan((Chunk(tokens[:CONTEXT], 0, table, 0),)))
    steps = {
        batch: Plan(tuple(Chunk(tokens[CONTEXT:], CONTEXT, t, 1) for t in tables[:batch]))
        for batch in batches
    }
    means: dict[tuple[int, int], list[float]] = {}
    with neighbours(most) as pids:
        for _ in range(ROUNDS):
            for count in range(most + 1):
                for pid in pids[:count]:
                    os.kill(pid, signal.SIGCONT)
                for batch, plan in steps.items():
                    seconds = []
                    end = time.perf_counter() + TURN_S
                    while (begin := time.perf_counter()) < end:
                        runtime.forward(plan)
                        seconds.append(time.perf_counter() - begin)
                    # The mean: it is what a reply takes. Single steps come in two kinds, held up or not.
                    means.setdefault((batch, count), []).append(1e3 * statistics.mean(seconds))
                for pid in pids[:count]:
                    os.kill(pid, signal.SIGSTOP)
    return {
        str(batch): {str(count): spread(means[batch, count]) for count in range(most + 1)}
        for batch in batches
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", default="1,4")
    parser.add_argument("--neighbours", type=int, default=2)
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batch.split(",")]
    row = {"bench": "neighbours", "context": CONTEXT, "turn_s": TURN_S, "machine": describe()}
    row["step_ms"] = measure(batches, args.neighbours)
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
