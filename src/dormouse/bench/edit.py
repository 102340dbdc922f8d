"""What speculation gains where a reply quotes its context, and what it costs where it does not.

Three replies, with and without it in turn, in one process:

- `edit`: a file of about 1500 tokens is given back with one name changed. Small models cannot do that, so
  the model computes each step and the reply is dictated to it, as a larger model would have written it.
- `repeat`: the model's own greedy reply when it is asked to repeat that file.
- `story`: the model's own sampled reply, which quotes nothing.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, cast

from dormouse.bench.client import PendingReply, Reply
from dormouse.bench.speed import spread
from dormouse.domain.errors import DormouseError
from dormouse.domain.plan import Plan
from dormouse.domain.requests import SamplingParams
from dormouse.engine import pool
from dormouse.engine.engine import Engine
from dormouse.engine.stats import EngineStats
from dormouse.models.stack import Stack
from dormouse.runtimes.base import Logits, Runtime

_NAMES = ("allocate", "take_page")
_STORY = "Write a long story about a dormouse that wakes up in spring."
_GREEDY = SamplingParams(temperature=0)
_SAMPLED = SamplingParams(temperature=0.8, seed=1)


class Dictation:
    """A runtime whose model computes everything and has its next token dictated to it. See `Runtime`."""

    def __init__(self, runtime: Runtime, prompt: list[int], reply: list[int]) -> None:
        self._runtime = runtime
        self._tokens = prompt + reply

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def forward(self, plan: Plan) -> Logits:
        """The model's logits, with the dictated token of each row as the best."""
        logits = self._runtime.forward(plan)
        positions = [p for c in plan.chunks for p in range(c.end - c.num_logits + 1, c.end + 1)]
        for row, position in zip(logits, positions, strict=True):
            if position < len(self._tokens):
                row[self._tokens[position]] = row.max() + 1
        return logits


def edit(stack: Stack, new_tokens: int, repeat: int) -> dict[str, Any]:
    """Tokens per second of each task with and without speculation. Ends the stack's own engine.

    Raises DormouseError if a reply depends on it.
    """
    stack.served.engine.stop(0)  # it would take the pages for its own
    chat = stack.served.chat
    source = inspect.getsource(pool)
    ask = f"Rename {_NAMES[0]} to {_NAMES[1]} in this file and give it back.\n\n{source}"
    edited = chat.encode(source.replace(*_NAMES), add_special_tokens=False)
    prompt = _prompt(stack, ask)
    return {
        "edit": _measure(
            stack,
            cast("Runtime", Dictation(stack.runtime, prompt, edited)),
            prompt,
            min(new_tokens, len(edited)),
            _GREEDY,
            repeat,
        ),
        "repeat": _measure(
            stack,
            stack.runtime,
            _prompt(stack, f"Repeat the following text exactly.\n\n{source}"),
            new_tokens,
            _GREEDY,
            repeat,
        ),
        "story": _measure(stack, stack.runtime, _prompt(stack, _STORY), new_tokens, _SAMPLED, repeat),
    }


def _prompt(stack: Stack, text: str) -> list[int]:
    return stack.served.chat.render([{"role": "user", "content": text}])


def _measure(
    stack: Stack, runtime: Runtime, prompt: list[int], new_tokens: int, sampling: SamplingParams, repeat: int
) -> dict[str, Any]:
    rates: dict[bool, list[float]] = {False: [], True: []}
    replies: set[tuple[int, ...]] = set()
    for turn in range(repeat):
        # Each goes first every other time: what the first one saves, the second one reads.
        for speculate in (False, True) if turn % 2 else (True, False):
            reply, stats = _reply(stack, runtime, prompt, new_tokens, sampling, speculate=speculate)
            replies.add(reply.token_ids)
            elapsed = reply.token_times[-1] - reply.token_times[0]
            rates[speculate].append((len(reply.token_times) - 1) / elapsed)
            if speculate:
                guesses = stats
    if len(replies) > 1:
        raise DormouseError("replies differ with and without speculation; please report this")
    return {
        "prompt_tokens": len(prompt),
        "new_tokens": new_tokens,
        "off_tokens_per_s": spread(rates[False], 2),
        "on_tokens_per_s": spread(rates[True], 2),
        "gain": spread([on / off for on, off in zip(rates[True], rates[False], strict=True)], 2),
        "drafted": guesses.drafted_tokens,
        "accepted": guesses.accepted_tokens,
    }


def _reply(
    stack: Stack,
    runtime: Runtime,
    prompt: list[int],
    new_tokens: int,
    sampling: SamplingParams,
    *,
    speculate: bool,
) -> tuple[Reply, EngineStats]:
    chat = stack.served.chat
    options = replace(stack.served.engine.options, speculate=speculate)
    engine = Engine(runtime, stack.store, chat.decode_stream, chat.eos_token_ids, options)
    try:
        return PendingReply(engine, prompt, new_tokens, sampling=sampling).wait(), engine.stats()
    finally:
        engine.stop(0)
