"""Constrained beside free decoding: `python -m benchmarks.constrained [--batch 1,8]`. One JSON row.

Free replies, replies kept to a schema that leaves the text to the model, and replies that call a tool take
turns in one engine, so that a slow moment hits them alike. Rates are tokens per second of all streams.
`forced` has speculation on: what the grammar leaves no choice of is guessed and always right.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dormouse.bench.machine import describe
from dormouse.bench.speed import spread
from dormouse.domain.agents import DEFAULT_TENANT
from dormouse.domain.conversation import Conversation, Message, OutputFormat, Role
from dormouse.domain.requests import Event, Failed, Finished, Request, SamplingParams
from dormouse.models.served import ServedModel
from dormouse.models.stack import Stack
from dormouse.settings import Settings

NEW_TOKENS = 128
_WAIT_S = 300.0

# Long texts in a fixed frame: nearly every token is the model's choice, as in free decoding.
PROSE = {
    "type": "array",
    "items": {"type": "string", "minLength": 200},
    "minItems": 8,
}
# Many short fields: most tokens are forced.
FIELDS = {
    "type": "object",
    "properties": {f"measured_value_{n}": {"type": "integer", "maximum": 999} for n in range(40)},
    "required": [f"measured_value_{n}" for n in range(40)],
    "additionalProperties": False,
}
FORMATS: dict[str, OutputFormat | None] = {
    "free": None,
    "prose": OutputFormat(PROSE),
    "fields": OutputFormat(FIELDS),
}


def rate(served: ServedModel, wanted: OutputFormat | None, batch: int, seed: int) -> float:
    """Tokens per second of `batch` replies, from the first submission to the last end."""
    chat, engine = served.chat, served.engine
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    requests = []
    for stream in range(batch):
        asked = Conversation((Message(Role.USER, f"Story {seed}.{stream}: tell of the sea."),), format=wanted)
        prompt = chat.render_conversation(asked)
        requests.append(
            Request(
                uuid.uuid4().hex,
                tuple(chat.encode(prompt, add_special_tokens=False)),
                SamplingParams(temperature=0.8, seed=seed, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS),
                events.put,
                constraint=chat.constraint(asked, prompt, DEFAULT_TENANT),
            )
        )
    begin = time.perf_counter()
    for request in requests:
        engine.submit(request)
    num_tokens = ends = 0
    while ends < batch:
        event = events.get(timeout=_WAIT_S)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            num_tokens += event.usage.completion_tokens
            ends += 1
    return num_tokens / (time.perf_counter() - begin)


def measure(batches: list[int], rounds: int, progress: Callable[[str], object]) -> dict[str, Any]:
    """Rates by speculation, batch and format."""
    rates: dict[tuple[str, int, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="dormouse-bench-") as folder:
        for speculation in ("off", "auto"):
            settings = Settings(
                data_dir=Path(folder) / speculation, arena_tokens=32768, speculation=speculation
            )
            with Stack.open(settings) as stack:
                for batch in batches:
                    for wanted in FORMATS.values():
                        rate(stack.served, wanted, batch, 0)  # compiles what there is to compile
                for seed in range(1, rounds + 1):
                    progress(f"speculation {speculation}, round {seed}\n")
                    for batch in batches:
                        for name, wanted in FORMATS.items():
                            key = (speculation, batch, name)
                            rates.setdefault(key, []).append(rate(stack.served, wanted, batch, seed))
    return {
        speculation: {
            str(batch): {name: _row(rates, speculation, batch, name) for name in FORMATS} for batch in batches
        }
        for speculation in ("off", "auto")
    }


def _row(rates: dict[tuple[str, int, str], list[float]], speculation: str, batch: int, name: str) -> Any:
    """The rate, and how much slower it is than that of the free replies of the same round."""
    own, free = rates[speculation, batch, name], rates[speculation, batch, "free"]
    slower = [100 * (1 - mine / theirs) for mine, theirs in zip(own, free, strict=True)]
    return {"tokens_per_s": spread(own), "slower_percent": round(statistics.median(slower), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batch.split(",")]
    row = {"bench": "constrained", "new_tokens": NEW_TOKENS, "machine": describe()}
    sys.stdout.write(json.dumps(row | measure(batches, args.rounds, sys.stderr.write)) + "\n")


if __name__ == "__main__":
    main()
