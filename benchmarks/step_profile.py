"""Where an engine step goes: `python -m benchmarks.step_profile [--batch 1,16] [--temperature 0]`.

One JSON row per batch: medians in microseconds of the parts of a step in which all streams decode. `forward`
is the runtime's call; all other parts are the engine thread's own Python. `hollow_forward_us` is that call,
on one thread, on a model of as many layers that are next to nothing in size: it is Python and dispatch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dormouse.bench.client import random_prompt
from dormouse.domain.cache_spec import KVFormat
from dormouse.domain.plan import Chunk, Plan
from dormouse.domain.requests import Event, Failed, Finished, Request, SamplingParams
from dormouse.engine import detokenizer, loop, saver, scheduler
from dormouse.engine.engine import Engine
from dormouse.models.stack import Stack
from dormouse.runtimes.base import Logits, Runtime
from dormouse.runtimes.torch.runtime import TorchRuntime
from dormouse.settings import Settings

CONTEXT, NEW_TOKENS = 64, 96


class Clock:
    """Adds up the seconds of each part, step by step."""

    def __init__(self, batch: int) -> None:
        self.steps: list[dict[str, float]] = []
        self._batch = batch
        self._now: dict[str, float] = defaultdict(float)
        self._counts = False

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time added to `part`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._now[part] += time.perf_counter() - begin

        return run

    def forward(self, function: Callable[[Plan], Logits]) -> Callable[[Plan], Logits]:
        """The runtime's call; it tells whether this step counts."""

        def run(plan: Plan) -> Logits:
            self._counts = len(plan.chunks) == plan.num_tokens == self._batch
            logits: Logits = self.timed("forward", function)(plan)
            return logits

        return run

    def step(self, function: Callable[[Any], bool]) -> Callable[[Any], bool]:
        """A whole step of the engine."""

        def run(engine_loop: Any) -> bool:
            self._now.clear()
            self._counts = False
            done: bool = self.timed("step", function)(engine_loop)
            if self._counts:
                self.steps.append(dict(self._now))
            return done

        return run


def profile(engine: Engine, runtime: Runtime, batch: int, sampling: SamplingParams) -> dict[str, Any]:
    """Parts of the steps of `batch` streams, in microseconds."""
    clock = Clock(batch)
    parts = (
        ("schedule", scheduler.Scheduler, "schedule"),
        ("sample", loop, "choose"),
        ("detokenize", detokenizer.Detokenizer, "step"),
        ("save", saver.Saver, "save_blocks"),
    )
    with mock.patch.object(loop.EngineLoop, "step", clock.step(loop.EngineLoop.step)):
        for name, owner, attribute in parts:
            _patch(owner, attribute, clock.timed(name, getattr(owner, attribute)))
        _patch(runtime, "forward", clock.forward(runtime.forward))
        try:
            _run(engine, batch, sampling)
        finally:
            mock.patch.stopall()
    for step in clock.steps:
        step["other"] = 2 * step["step"] - sum(step.values())
    medians = {
        name: statistics.median(1e6 * step.get(name, 0.0) for step in clock.steps)
        for name in ("step", "forward", *(name for name, _, _ in parts), "other")
    }
    figures = {f"{name}_us": round(value, 1) for name, value in medians.items()}
    outside = round(100 * (1 - medians["forward"] / medians["step"]), 2)
    return {"batch": batch, "steps": len(clock.steps), **figures, "outside_forward_percent": outside}


def hollow_forward_us(num_layers: int, batches: list[int]) -> dict[int, float]:
    """Microseconds of a forward pass in which there is nothing to compute, by batch."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="dormouse-bench-") as folder, ThreadPoolExecutor(1) as loader:
        LlamaForCausalLM(config).save_pretrained(folder)
        # In a thread that ends, as `Stack.open` does it.
        runtime = loader.submit(
            TorchRuntime.load,
            Path(folder),
            name="hollow",
            kv_format=KVFormat.K8V4,
            block_size=128,
            arena_tokens=128 * max(batches),
            weights="auto",
        ).result()
    torch.set_num_threads(1)
    times: dict[int, list[float]] = {batch: [] for batch in batches}
    for position in range(1, 100):
        for batch in batches:
            chunks = tuple(Chunk((7,), position, (page,), 1) for page in range(batch))
            begin = time.perf_counter()
            runtime.forward(Plan(chunks))
            times[batch].append(1e6 * (time.perf_counter() - begin))
    runtime.close()
    torch.set_num_threads(threads)
    return {batch: statistics.median(values) for batch, values in times.items()}


def _patch(owner: Any, attribute: str, replacement: Any) -> None:
    mock.patch.object(owner, attribute, replacement).start()


def _run(engine: Engine, batch: int, sampling: SamplingParams) -> None:
    events: SimpleQueue[Event] = SimpleQueue()
    vocab_size = engine.runtime.spec.vocab_size
    for seed in range(batch):
        prompt = random_prompt(seed, CONTEXT, vocab_size)
        engine.submit(Request(uuid.uuid4().hex, tuple(prompt), sampling, events.put))
    ends = 0
    while ends < batch:
        ends += isinstance(events.get(), Finished | Failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    args = parser.parse_args()
    sampling = SamplingParams(
        temperature=args.temperature, top_p=args.top_p, max_tokens=NEW_TOKENS, ignore_eos=True, seed=1
    )
    with tempfile.TemporaryDirectory(prefix="dormouse-bench-") as folder:
        settings = Settings(data_dir=Path(folder), arena_tokens=16384, speculation="off")
        with Stack.open(settings) as stack:
            batches = [int(batch) for batch in args.batch.split(",")]
            hollow = hollow_forward_us(stack.runtime.spec.num_layers, batches)
            for batch in batches:
                row = profile(stack.served.engine, stack.runtime, batch, sampling)
                row["hollow_forward_us"] = round(hollow[batch], 1)
                sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
