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
from pathlib import Path
from typing import Any

from dormouse.bench.client import PendingReply, random_prompt
from dormouse.domain.errors import DormouseError
from dormouse.models.stack import Stack
from dormouse.settings import Settings

_AGENT = "wake"
_CHILD_TIMEOUT_S = 900


def wake(settings: Settings, context: int, repeat: int) -> dict[str, Any]:
    """Cold prefill and wake of `repeat` agents of `context` tokens, each woken by its own process."""
    runs = []
    for seed in range(repeat):
        with tempfile.TemporaryDirectory(prefix="dormouse-bench-") as folder:
            job = json.loads(settings.model_copy(update={"data_dir": Path(folder)}).model_dump_json())
            cold = _in_fresh_process(job, context, seed)
            woken = _in_fresh_process(job, context, seed)
            runs.append((cold, woken))
    cold_ms = statistics.median(cold["ttft_ms"] for cold, _ in runs)
    wake_ms = statistics.median(woken["ttft_ms"] for _, woken in runs)
    return {
        "context": context,
        "cold_ttft_ms": round(cold_ms, 1),
        "wake_ttft_ms": round(wake_ms, 1),
        "ratio": round(cold_ms / wake_ms, 1),
        "recomputed_tokens": max(woken["recomputed_tokens"] for _, woken in runs),
        "ready_s": round(statistics.median(woken["ready_s"] for _, woken in runs), 2),
        "same_token": all(cold["token"] == woken["token"] for cold, woken in runs),
        "runs": [{"cold_ttft_ms": c["ttft_ms"], "wake_ttft_ms": w["ttft_ms"]} for c, w in runs],
    }


def _in_fresh_process(settings: dict[str, Any], context: int, seed: int) -> dict[str, Any]:
    job = json.dumps({"settings": settings, "context": context, "seed": seed})
    command = [sys.executable, "-m", "dormouse.bench.wake", job]
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
        engine = stack.served.engine
        prompt = random_prompt(job["seed"], job["context"], stack.served.vocab_size)
        reply = PendingReply(engine, prompt, 1, _AGENT).wait()
    return {
        "ready_s": ready_s,
        "ttft_ms": round(1000 * reply.ttft_s, 1),
        "recomputed_tokens": reply.usage.prompt_tokens - reply.usage.cached_tokens,
        "token": reply.token_ids[0],
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_child(json.loads(sys.argv[1]))))
