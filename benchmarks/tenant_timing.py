"""Whether time tells one tenant what another one asked: `python -m benchmarks.tenant_timing [--rounds 40]`.

One JSON row. In each round one tenant sends a prompt of its own. Then another tenant sends the same one
(`after_other`), a prompt that nobody has sent (`after_nobody`), and its own first one again (`after_self`),
in an order that is drawn. Times are in milliseconds, from the request to the whole answer of one token, or to
the count. `p` is the chance of a difference as large as that of `after_other` and `after_nobody` if there
were none: of 10 000 draws in which each round's two times may change places, the share that differs as much.
`interval_ms` bounds that difference's median with 95% confidence. `control_p` is the same of `after_self`: a
difference would be seen.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server import serve
from dormouse.api.keys import KeyFile
from dormouse.bench.machine import describe

NUM_DRAWS = 10_000
WORDS = (
    "hay",
    "cart",
    "mouse",
    "sleep",
    "winter",
    "hedge",
    "acorn",
    "river",
    "stone",
    "lamp",
    "seven",
    "nine",
)
CASES = ("after_other", "after_nobody", "after_self")

Ask = Callable[[httpx.Client, str], object]


def prompt(draw: random.Random, num_words: int) -> str:
    """Words that nobody has sent."""
    return " ".join(draw.choice(WORDS) for _ in range(num_words))


def first_token(http: httpx.Client, text: str) -> object:
    """The answer's first token."""
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 1,
        "temperature": 0,
    }
    return http.post("/v1/chat/completions", json=body).raise_for_status()


def count(http: httpx.Client, text: str) -> object:
    """The number of tokens, which is cheaper for texts that were tokenized before."""
    body = {"model": "smollm2", "messages": [{"role": "user", "content": text}]}
    return http.post("/v1/messages/count_tokens", json=body).raise_for_status()


def measure(ask: Ask, one: httpx.Client, other: httpx.Client, rounds: int, num_words: int) -> dict[str, Any]:
    """The times of each case over all rounds, and what they tell."""
    draw = random.Random(7)
    times: dict[str, list[float]] = {case: [] for case in CASES}
    for number in range(rounds + 1):
        texts = {case: prompt(draw, num_words) for case in CASES}
        ask(one, texts["after_other"])
        ask(other, texts["after_self"])
        for case in draw.sample(CASES, len(CASES)):
            begin = time.perf_counter()
            ask(other, texts[case])
            if number:  # the first round makes what is made on first use
                times[case].append(1e3 * (time.perf_counter() - begin))
    differences = [a - b for a, b in zip(times["after_other"], times["after_nobody"], strict=True)]
    return {
        "words": num_words,
        "median_ms": {case: round(statistics.median(values), 3) for case, values in times.items()},
        "difference_ms": round(statistics.median(differences), 3),
        "interval_ms": interval(differences, draw),
        "p": p_value(differences, draw),
        "control_p": p_value(
            [a - b for a, b in zip(times["after_self"], times["after_nobody"], strict=True)], draw
        ),
    }


def p_value(differences: list[float], draw: random.Random) -> float:
    """Two-sided, by exchanging the two of each pair."""
    found = abs(sum(differences))
    as_large = sum(
        abs(sum(value if draw.random() < 0.5 else -value for value in differences)) >= found
        for _ in range(NUM_DRAWS)
    )
    return round((as_large + 1) / (NUM_DRAWS + 1), 4)


def interval(differences: list[float], draw: random.Random) -> tuple[float, float]:
    """Bounds of the median, by drawing rounds again and again."""
    medians = sorted(
        statistics.median(draw.choices(differences, k=len(differences))) for _ in range(NUM_DRAWS // 5)
    )
    return round(medians[len(medians) // 40], 3), round(medians[-len(medians) // 40 - 1], 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--words", type=int, default=300, help="Words of each prompt; about as many tokens.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dormouse-tenants-") as folder:
        data = Path(folder) / "data"
        file = KeyFile(data)
        keys = [file.add("one"), file.add("other")]
        with serve(data, "--arena-tokens", "65536") as server:
            one, other = (
                httpx.Client(base_url=server.url, headers={"x-api-key": key}, timeout=600) for key in keys
            )
            with one, other:
                row = {
                    "first_token": measure(first_token, one, other, args.rounds, args.words),
                    "count_tokens": measure(count, one, other, args.rounds, 10 * args.words),
                }
    told = {"benchmark": "tenant_timing", "rounds": args.rounds, **row, "machine": describe()}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
