"""What a swap costs: `python -m benchmarks.swap [--repeat 5]`. One JSON row.

The embedded model and a twin of it with other weights take turns on one server, beside each other or one
after the other, while an agent of the first sleeps and wakes. `swap_s` is what the caller waits; `gap_ms` the
longest time in which no request was answered, as seen by a client that asks without a pause.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.conversation import Conversation
from benchmarks.server import Server, serve
from benchmarks.twin import make_twin
from dormouse.bench.machine import describe
from dormouse.models.sources import resolve
from dormouse.settings import Settings

TWIN = "twin"
CONTEXT_WORDS = 600


def main() -> int:
    """Print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="times there and back")
    repeat = parser.parse_args().repeat
    row = {"benchmark": "swap", **measure(repeat), "machine": describe()}
    sys.stdout.write(json.dumps(row, indent=2) + "\n")
    return 0


def measure(repeat: int) -> dict[str, Any]:
    """Medians over `repeat` swaps there and as many back. Memory in MiB."""
    settings = Settings()
    folder = resolve(settings.model, settings.models_dir)
    with tempfile.TemporaryDirectory(prefix="dormouse-swap-") as base:
        models = Path(base) / "models"
        make_twin(folder, models / TWIN)
        (models / folder.name).symlink_to(folder.path)
        flags = ("--models-dir", str(models), "--model", folder.name, "--arena-tokens", "16384")
        with serve(Path(base) / "data", *flags) as server, server.client() as client:
            return _measure(server, client, folder.name, repeat)


def _measure(server: Server, client: httpx.Client, name: str, repeat: int) -> dict[str, Any]:
    process = psutil.Process(server.pid)
    agent = Conversation("sleeper")
    agent.say(client, "word " * CONTEXT_WORDS, max_tokens=4)
    before = process.memory_info().rss / 2**20
    swaps: list[dict[str, Any]] = []
    wakes: list[float] = []
    gaps: list[float] = []
    resident: list[float] = []
    for _ in range(repeat):
        for target in (TWIN, name):
            with Asker(server.url) as asker:
                swaps.append(_swap(client, target))
            gaps.append(asker.longest_s)
            resident.append(process.memory_info().rss / 2**20)
        reply = agent.say(client, "And now?", max_tokens=4)
        assert reply.cached_tokens > CONTEXT_WORDS, "the agent did not wake from disk"
        wakes.append(reply.ttft_ms)
    phases = swaps[0]["phases"]
    return {
        "swaps": len(swaps),
        "beside": all(swap["beside"] for swap in swaps),
        "swap_s": round(statistics.median(swap["seconds"] for swap in swaps), 2),
        "swap_max_s": round(max(swap["seconds"] for swap in swaps), 2),
        "phases_s": {
            phase: round(statistics.median(swap["phases"][phase] for swap in swaps), 3) for phase in phases
        },
        "gap_ms": round(1e3 * statistics.median(gaps), 1),
        "first_token_of_the_agent_after_ms": round(statistics.median(wakes), 1),
        "resident_mib_before": round(before, 1),
        "resident_mib_after": [round(size, 1) for size in resident],
    }


def _swap(client: httpx.Client, model: str) -> dict[str, Any]:
    answer = client.post("/admin/models/swap", json={"model": model})
    answer.raise_for_status()
    result: dict[str, Any] = answer.json()
    return result


class Asker:
    """Asks for one token again and again, of whatever is served; `longest_s` is the longest answer."""

    def __init__(self, url: str) -> None:
        self.longest_s = 0.0
        self._url = url
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Asker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self) -> None:
        body = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._done.is_set():
                begun = time.monotonic()
                client.post("/v1/chat/completions", json=body).raise_for_status()
                self.longest_s = max(self.longest_s, time.monotonic() - begun)


if __name__ == "__main__":
    sys.exit(main())
