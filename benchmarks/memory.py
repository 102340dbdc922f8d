"""Resident memory of a server: over many requests, and while its agents sleep.

`python -m benchmarks.memory`: 200 requests by 50 agents, one after the other, on an arena that holds 5; then
100 agents that only the disk knows, after a restart.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from benchmarks.conversation import Conversation
from benchmarks.resident import Resident
from benchmarks.server import serve
from dormouse.bench.machine import describe

CONTEXT_TOKENS = 1024
CHARS_PER_TOKEN = 4.5


def main() -> int:
    """Print one JSON row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--agents", type=int, default=50)
    parser.add_argument("--held", type=int, default=5, help="agents that the arena holds")
    parser.add_argument("--asleep", type=int, default=100, help="agents that sleep through a restart")
    options = parser.parse_args()
    row = {
        "benchmark": "memory",
        **measure(options.requests, options.agents, options.held),
        "asleep": measure_asleep(options.asleep),
        "machine": describe(),
    }
    sys.stdout.write(json.dumps(row, indent=2) + "\n")
    return 0


def measure(num_requests: int, num_agents: int, held: int) -> dict[str, Any]:
    """Resident memory in MiB after each request; growth is from the first full round to the end."""
    flags = ("--arena-tokens", str(held * (CONTEXT_TOKENS + 128)))
    samples: list[float] = []
    with (
        tempfile.TemporaryDirectory(prefix="dormouse-memory-") as folder,
        serve(Path(folder), *flags) as server,
        server.client() as client,
    ):
        process = psutil.Process(server.pid)
        for number in range(num_requests):
            name = f"agent-{number % num_agents}"
            Conversation(name).say(client, _context(name), max_tokens=8)
            samples.append(process.memory_info().rss / 2**20)
        engine = client.get("/health").json()["engine"]
    settled = samples[num_agents - 1]
    return {
        "requests": num_requests,
        "agents": num_agents,
        "arena_holds": held,
        "resident_mib_after_first_round": round(settled, 1),
        "resident_mib_at_end": round(samples[-1], 1),
        "growth_percent": round(100 * (samples[-1] / settled - 1), 2),
        "peak_over_settled_percent": round(100 * (max(samples[num_agents:]) / settled - 1), 2),
        "disk_tokens": engine["disk_tokens"],
        "computed_tokens": engine["computed_tokens"],
    }


def measure_asleep(num_agents: int) -> dict[str, Any]:
    """What a restarted server takes while all of its agents sleep, and how soon it was ready."""
    with tempfile.TemporaryDirectory(prefix="dormouse-memory-") as folder:
        with serve(Path(folder)) as server, server.client() as client:
            for number in range(num_agents):
                Conversation(f"agent-{number}").say(client, f"I am number {number}. " * 60, max_tokens=4)
            server.stop()
        with serve(Path(folder)) as server, server.client() as client:
            health = client.get("/health").json()
            assert health["engine"]["pages_used"] == health["engine"]["pages_idle"] == 0
            weights = health["memory"]["weights_nbytes"] / 2**20
            return {
                "agents": num_agents,
                "ready_s": round(server.ready_s, 2),
                **Resident.of(server.pid).beyond(weights),
            }


def _context(name: str) -> str:
    line = f"{name} remembers a long list of things. "
    return line * int(CONTEXT_TOKENS * CHARS_PER_TOKEN / len(line))


if __name__ == "__main__":
    sys.exit(main())
