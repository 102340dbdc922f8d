"""Speculation on the real model: the same tokens with the same log probabilities, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.engine.harness import Client

from dormouse.domain.requests import Finished, SamplingParams, TextDelta, TokenLogprob
from dormouse.engine.engine import Engine
from dormouse.models.folder import ModelFolder
from dormouse.models.stack import Stack
from dormouse.settings import Settings

pytestmark = pytest.mark.timeout(300)

LOG = "".join(f"{10 + i}:00 cart {i % 3} passed the gate of the mill\n" for i in range(12))
PROMPT = f"{LOG}\nAgain, line by line:\n\n{LOG[:150]}"
GREEDY = SamplingParams(temperature=0, max_tokens=64, top_logprobs=1)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, smollm2: ModelFolder) -> Iterator[Stack]:
    assert smollm2.path
    folder = tmp_path_factory.mktemp("data")
    with Stack.open(Settings(data_dir=folder, arena_tokens=4096)) as stack:
        stack.served.engine.stop(0)  # the tests bring their own
        yield stack


def reply(
    stack: Stack, params: SamplingParams, *, speculate: bool
) -> tuple[str, list[TokenLogprob], Finished, int]:
    chat = stack.served.chat
    options = replace(stack.served.engine.options, speculate=speculate)
    engine = Engine(stack.runtime, stack.store, chat.decode_stream, chat.eos_token_ids, options)
    try:
        call = Client(engine).submit(chat.encode(PROMPT), params)
        entries: list[TokenLogprob] = []
        while call.end is None:
            event = call.next()
            if isinstance(event, TextDelta):
                entries += event.logprobs
        assert isinstance(call.end, Finished)
        return call.text, entries, call.end, engine.stats().accepted_tokens
    finally:
        engine.stop(0)
        engine.check()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.8, "top_p": 0.95, "seed": 4},
        {"frequency_penalty": 0.1, "repetition_penalty": 1.02},
        {"stop": ("15:00",)},
        {"max_tokens": 37},
    ],
    ids=lambda changes: " ".join(changes) or "greedy",
)
def test_the_reply_is_the_same_to_the_bit(stack: Stack, changes: dict[str, Any]) -> None:
    params = replace(GREEDY, **changes)
    # Both find the prompt as this one leaves it.
    reply(stack, replace(params, max_tokens=1), speculate=False)
    text, entries, end, _ = reply(stack, params, speculate=False)
    assert reply(stack, params, speculate=True)[:2] == (text, entries)
    if not changes:
        _, _, drafted_end, accepted = reply(stack, params, speculate=True)
        assert accepted > 20
        assert drafted_end.usage.completion_tokens == end.usage.completion_tokens
