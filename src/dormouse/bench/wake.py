"""Waking an agent after a restart, in fresh processes: one says it for the first time, another one wakes.

Run as a module, this file is such a process: it reads a JSON job, prints a JSON result and ends.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from dormouse.bench import page_cache
from dormouse.bench.client import PendingReply, Reply, random_prompt
from dormouse.domain.errors import DormouseError
from dormouse.models.stack import Stack
from dormouse.settings import Settings

_AGENT = "wake"
_STREAM_PROMPT = 64
_STREAM_TOKENS = 32
_WAKES = ("warm", "beside", "dropped")
_FIGURES = (
    ("wake_cold_cache_ttft_ms", "dropped", "ttft_ms"),
    ("wake_beside_a_stream_ttft_ms", "beside", "ttft_ms"),
    ("stream_longest_gap_ms", "beside", "longest_gap_ms"),
    ("stream_usual_step_ms", "beside", "usual_step_ms"),
)
"""What is reported beside the first two: its name, and which process said it under which name."""

_CHILD_TIMEOUT_S = 900


def wake(settings: Settings, context: int, repeat: int) -> dict[str, Any]:
    """Cold prefill and wakes of `repeat` agents of `context` tokens, each in a process of its own.

    Each agent wakes three times: with its files in the page cache, with them dropped from it, and while
    another stream decodes.
    """
    runs = [_measure(settings, context, seed) for seed in range(repeat)]

    def median(kind: str, figure: str) -> float:
        return round(float(statistics.median(run[kind][figure] for run in runs)), 1)

    cold_ms, wake_ms = median("cold", "ttft_ms"), median("warm", "ttft_ms")
    woken = [run[kind] for run in runs for kind in _WAKES]
    figures = {name: (kind, figure) for name, kind, figure in _FIGURES}
    return {
        "context": context,
        "cold_ttft_ms": cold_ms,
        "wake_ttft_ms": wake_ms,
        "ratio": round(cold_ms / wake_ms, 1),
        **{name: median(*place) for name, place in figures.items()},
        "recomputed_tokens": max(one["recomputed_tokens"] for one in woken),
        "ready_s": round(statistics.median(run["warm"]["ready_s"] for run in runs), 2),
        "same_token": all(run["cold"]["token"] == run[kind]["token"] for run in runs for kind in _WAKES),
        "runs": [
            {"cold_ttft_ms": run["cold"]["ttft_ms"], "wake_ttft_ms": run["warm"]["ttft_ms"]}
            | {name: run[kind][figure] for name, (kind, figure) in figures.items()}
            for run in runs
        ],
    }


def _measure(settings: Settings, context: int, seed: int) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="dormouse-bench-") as folder:
        data_dir = Path(folder)
        own = settings.model_copy(update={"data_dir": data_dir, "encryption": "off"})
        job = {
            "settings": json.loads(own.model_dump_json()),
            "context": context,
            "seed": seed,
        }
        runs = {"cold": _in_fresh_process(job)}
        page_cache.warm(data_dir)
        runs["warm"] = _in_fresh_process(job)
        runs["beside"] = _in_fresh_process(job | {"beside": True})
        page_cache.drop(data_dir)
        runs["dropped"] = _in_fresh_process(job)
        return runs


def _in_fresh_process(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "dormouse.bench.wake", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_CHILD_TIMEOUT_S)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise DormouseError(f"the measured process failed: {last}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _child(job: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    with Stack.open(Settings(**job["settings"])) as stack:
        ready_s = time.monotonic() - started
        engine, vocab_size = stack.served.engine, stack.served.vocab_size
        stream = None
        if job.get("beside"):
            stream = PendingReply(engine, random_prompt(-1, _STREAM_PROMPT, vocab_size), _STREAM_TOKENS)
            stream.wait_for_first_token()
        reply = PendingReply(engine, random_prompt(job["seed"], job["context"], vocab_size), 1, _AGENT).wait()
        other = stream.wait() if stream is not None else None
    return {
        "ready_s": ready_s,
        "ttft_ms": round(1000 * reply.ttft_s, 1),
        "recomputed_tokens": reply.usage.prompt_tokens - reply.usage.cached_tokens,
        "token": reply.token_ids[0],
        **({} if other is None else _gaps(other, reply)),
    }


def _gaps(stream: Reply, woken: Reply) -> dict[str, float]:
    """How long the stream went without a token while `woken` woke, and its usual step afterwards."""
    gaps = [(end, end - start) for start, end in pairwise(stream.token_times)]
    during = [gap for end, gap in gaps if end <= woken.token_times[0] + gap]
    after = [gap for end, gap in gaps if end > woken.token_times[0] + gap]
    return {
        "longest_gap_ms": round(1000 * max(during), 1),
        "usual_step_ms": round(1000 * statistics.median(after), 1),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_child(json.loads(sys.argv[1]))))
