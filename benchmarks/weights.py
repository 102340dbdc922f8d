"""What each form of weights costs and gains: `python -m benchmarks.weights`. One JSON row each.

All forms are loaded at once and take turns, in the runtime alone: milliseconds of a decode step by the
number of streams (or `1 at 4000`, a stream at that context), and prompt tokens per second over 4096 tokens.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from dormouse.bench.client import random_prompt
from dormouse.domain.plan import Chunk, Plan
from dormouse.models.runtimes import load_runtime
from dormouse.models.sources import resolve
from dormouse.runtimes.base import Runtime
from dormouse.settings import Settings

FORMS = ("bf16", "int8", "int4", "auto")
PROMPT, CHUNK, SHORT, LONG = 4096, 512, 100, 4000
BATCHES = (1, 2, 4, 8, 16)
PREFILLS, STEPS = 3, 30


def prefill(runtime: Runtime) -> float:
    """Seconds to read the prompt."""
    tokens = tuple(random_prompt(0, PROMPT, runtime.spec.vocab_size))
    begin = time.perf_counter()
    for start in range(0, PROMPT, CHUNK):
        end = start + CHUNK
        pages = tuple(range(-(-end // runtime.cache.block_size)))
        runtime.forward(Plan((Chunk(tokens[start:end], start, pages, int(end == PROMPT)),)))
    return time.perf_counter() - begin


def step(runtime: Runtime, streams: int, context: int) -> float:
    """Seconds of a step that decodes `streams` streams of `context` tokens, each with pages of its own."""
    count = -(-(context + 1) // runtime.cache.block_size)
    chunks = (
        Chunk((5,), context, tuple(range(stream * count, (stream + 1) * count)), 1)
        for stream in range(streams)
    )
    begin = time.perf_counter()
    runtime.forward(Plan(tuple(chunks)))
    return time.perf_counter() - begin


def main() -> None:
    settings = {form: Settings(weights=form, arena_tokens=PROMPT + 512) for form in FORMS}
    folder = resolve(settings["auto"].model, settings["auto"].models_dir)
    with ThreadPoolExecutor(1) as loader:
        runtimes = {form: loader.submit(load_runtime, s, folder).result() for form, s in settings.items()}
    cases = [(streams, SHORT) for streams in BATCHES] + [(1, LONG)]
    prefills: dict[str, list[float]] = {form: [] for form in FORMS}
    steps: dict[str, dict[tuple[int, int], list[float]]] = {form: {c: [] for c in cases} for form in FORMS}
    for _ in range(PREFILLS):
        for form, runtime in runtimes.items():
            prefills[form].append(prefill(runtime))
    for case in cases:
        for _ in range(STEPS):
            for form, runtime in runtimes.items():
                steps[form][case].append(step(runtime, *case))
    for form, runtime in runtimes.items():
        row = {
            "weights": form,
            "mb": round(runtime.weights_nbytes / 1e6, 1),
            "prefill_tokens_per_s": round(PROMPT / statistics.median(prefills[form])),
            "step_ms": {
                str(streams) if context == SHORT else f"{streams} at {context}": round(
                    1000 * statistics.median(values), 1
                )
                for (streams, context), values in steps[form].items()
            },
        }
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
