"""What encryption costs a wake: `python -m benchmarks.encryption [--rounds 25]`. One JSON row.

One process has an agent in a plain folder and the same in an encrypted one. They sleep and wake by turns, so
that a busy machine slows both; the files stay in the page cache, where decrypting shows most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from dormouse.bench.client import PendingReply, Reply, random_prompt
from dormouse.bench.machine import describe
from dormouse.domain.agents import DEFAULT_TENANT
from dormouse.models.agents import Agents
from dormouse.models.stack import Stack
from dormouse.settings import Settings

AGENT = "wake"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    times: dict[str, list[float]] = {"plain": [], "encrypted": []}
    replies: list[Reply] = []
    with tempfile.TemporaryDirectory(prefix="dormouse-bench-") as name:
        folder = Path(name)
        plain = Settings(encryption="off", data_dir=folder / "plain", arena_tokens=2 * args.context)
        key = {"encryption": "file", "encryption_key_file": folder / "master.key"}
        sealed = plain.model_copy(update={"data_dir": folder / "encrypted", **key})
        with Stack.open(plain) as first, Stack.open(sealed) as second:
            stacks = {"plain": first, "encrypted": second}
            for stack in stacks.values():
                reply(stack, args.context)
                if not stack.store.flush():
                    raise RuntimeError("the agent is not on the disk")
            for turn in range(args.rounds + 1):
                # Who goes first takes turns, too.
                for kind in sorted(stacks, reverse=turn % 2 == 0):
                    woken = wake(stacks[kind], args.context)
                    replies.append(woken)
                    if turn:  # the first warms caches
                        times[kind].append(round(1000 * woken.ttft_s, 2))
    medians = {kind: statistics.median(of) for kind, of in times.items()}
    row = {
        "bench": "encryption",
        "context": args.context,
        "wake_ttft_ms": {kind: round(median, 1) for kind, median in medians.items()},
        "lower_quartile_wake_ttft_ms": {
            kind: round(statistics.quantiles(of, n=4)[0], 1) for kind, of in times.items()
        },
        "least_wake_ttft_ms": {kind: round(min(of), 1) for kind, of in times.items()},
        "median_of_differences_ms": round(
            statistics.median(b - a for a, b in zip(times["plain"], times["encrypted"], strict=True)), 1
        ),
        "recomputed_tokens": max(one.usage.prompt_tokens - one.usage.cached_tokens for one in replies),
        "same_token": len({one.token_ids[0] for one in replies}) == 1,
        "rounds_ms": times,
        "machine": describe(),
    }
    sys.stdout.write(json.dumps(row, indent=2) + "\n")


def reply(stack: Stack, context: int) -> Reply:
    """One token of the agent after its context."""
    prompt = random_prompt(0, context, stack.served.vocab_size)
    return PendingReply(stack.served.engine, prompt, 1, AGENT).wait()


def wake(stack: Stack, context: int) -> Reply:
    """The same after its pages were given back."""
    if not Agents(stack.served, stack.store).sleep(DEFAULT_TENANT, AGENT):
        raise RuntimeError("the agent was not put to sleep")
    return reply(stack, context)


if __name__ == "__main__":
    main()
