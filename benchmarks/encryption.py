"""What encryption costs a wake: `python -m benchmarks.encryption [--context 4096]`. One JSON row.

Agents wake from a plain store and from an encrypted one by turns, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from dormouse.bench.machine import describe
from dormouse.bench.wake import measure
from dormouse.settings import Settings

WAKES = ("warm", "dropped", "beside")
"""Files in the page cache, files not there, and beside a stream that decodes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    runs: dict[str, list[dict[str, dict[str, Any]]]] = {"plain": [], "encrypted": []}
    with tempfile.TemporaryDirectory(prefix="dormouse-bench-") as folder:
        key_file = Path(folder) / "master.key"
        plain = Settings(encryption="off")
        encrypted = plain.model_copy(update={"encryption": "file", "encryption_key_file": key_file})
        for seed in range(args.repeat):
            # Who goes first takes turns, too: the second finds warmer caches.
            pair = [("plain", plain), ("encrypted", encrypted)]
            for name, settings in pair if seed % 2 == 0 else reversed(pair):
                runs[name].append(measure(settings, args.context, seed))
    ttft = {name: {wake: _times(of, wake) for wake in WAKES} for name, of in runs.items()}
    pairs = zip(runs["plain"], runs["encrypted"], strict=True)
    row = {
        "bench": "encryption",
        "context": args.context,
        "wake_ttft_ms": {
            name: {wake: round(statistics.median(times), 1) for wake, times in of.items()}
            for name, of in ttft.items()
        },
        "best_wake_ttft_ms": {name: {wake: min(of[wake]) for wake in WAKES} for name, of in ttft.items()},
        "ready_s": {
            name: round(statistics.median(run["warm"]["ready_s"] for run in of), 2)
            for name, of in runs.items()
        },
        "recomputed_tokens": max(
            run[wake]["recomputed_tokens"] for of in runs.values() for run in of for wake in WAKES
        ),
        "same_token": all(
            a[wake]["token"] == b[wake]["token"] for a, b in pairs for wake in ("cold", *WAKES)
        ),
        "runs_ms": ttft,
        "machine": describe(),
    }
    sys.stdout.write(json.dumps(row, indent=2) + "\n")


def _times(runs: list[dict[str, dict[str, Any]]], wake: str) -> list[float]:
    return [run[wake]["ttft_ms"] for run in runs]


if __name__ == "__main__":
    main()
