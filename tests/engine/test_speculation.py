"""Speculation changes how fast a reply comes, and nothing else: every test runs with and without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.engine.harness import GREEDY, GatedRuntime, opened

from dormouse.domain.errors import ModelOutputInvalid
from dormouse.domain.requests import Finished, SamplingParams, TextDelta, TokenLogprob
from dormouse.engine.stats import EngineStats
from dormouse.runtimes.fake import EOS, VOCAB_SIZE, FakeRuntime, _mix, encode

PROMPT = "abcdefgh abcdefgh abcdefgh abc"
NUM_LETTERS = 24
EVERY_TOKEN = np.arange(VOCAB_SIZE, dtype=np.uint64)


class QuotingRuntime(GatedRuntime):
    """Prefers one letter after each letter, most of the time: its replies go in circles, and leave them
    now and then, by all of the past as it stands in the pages."""

    def __init__(self, num_pages: int = 32, *, eos_every: int = 0) -> None:
        super().__init__(num_pages)
        self._eos_every = eos_every
        self.run_freely()

    def _logits(self, pages: tuple[int, ...], num_tokens: int) -> NDArray[np.float32]:
        row = super()._logits(pages, num_tokens)
        row[97 + (5 * self.token_at(pages, num_tokens - 1) + 3) % NUM_LETTERS] += 4.5
        if self._eos_every and num_tokens % self._eos_every == 0:
            row[EOS] = row.max() + 1
        return row

    def token_at(self, pages: tuple[int, ...], position: int) -> int:
        """The token whose KV stands at `position`."""
        index, place = divmod(position, self.cache.block_size)
        word = self._rows(pages[index])[place]
        return int((_mix(EVERY_TOKEN, position) == word).argmax())  # type: ignore[arg-type]


Reply = tuple[str, list[TokenLogprob], Finished]


def reply(
    folder: Path, params: SamplingParams, *, speculate: bool, prompt: str = PROMPT, eos_every: int = 0
) -> tuple[Reply, EngineStats]:
    runtime = QuotingRuntime(eos_every=eos_every)
    with opened(folder, runtime=runtime, speculate=speculate) as client:
        call = client.submit(prompt, params, agent="a")
        entries: list[TokenLogprob] = []
        while call.end is None:
            event = call.next()
            if isinstance(event, TextDelta):
                entries += event.logprobs
        stats = client.engine.stats()
        # What was saved is the same too: the next turn finds all but the last token.
        again = client.submit(prompt + call.text + "!", replace(GREEDY, max_tokens=3)).finished()
        assert again.usage.memory_tokens >= len(prompt + call.text) - 1
    assert isinstance(call.end, Finished)
    return (call.text, entries, call.end), stats


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.3, "seed": 3},
    "hot": {"temperature": 1.5, "top_p": 0.95, "top_k": 40, "min_p": 0.01, "seed": 4},
    "logprobs": {"top_logprobs": 2},
    "sampled logprobs": {"top_logprobs": 2, "temperature": 0.3, "seed": 5},
    "penalties": {"frequency_penalty": 0.02, "presence_penalty": 0.05, "repetition_penalty": 1.02},
    "sampled penalties": {"frequency_penalty": 0.02, "temperature": 0.3, "seed": 6},
    "bias": {"logit_bias": ((98, 1.0), (99, -1.0))},
    "min tokens": {"min_tokens": 70},
    "ignore eos": {"ignore_eos": True},
}


@pytest.mark.parametrize("eos_every", [0, 90], ids=["no end", "an end"])
@pytest.mark.parametrize("case", CASES)
def test_the_reply_is_the_same(tmp_path: Path, case: str, eos_every: int) -> None:
    params = replace(GREEDY, max_tokens=120, **CASES[case])
    plain, _ = reply(tmp_path / "plain", params, speculate=False, eos_every=eos_every)
    drafted, stats = reply(tmp_path / "drafted", params, speculate=True, eos_every=eos_every)
    assert drafted == plain
    if case != "hot":
        assert stats.drafted_tokens > stats.accepted_tokens > 0, "some guesses were right and some wrong"
    assert stats.generated_tokens == plain[2].usage.completion_tokens
    assert stats.computed_tokens == len(PROMPT) + stats.generated_tokens - 1


@given(max_tokens=st.integers(1, 70), length=st.integers(3, 40))
@settings(max_examples=30, deadline=None)
def test_it_ends_where_it_would_end(
    tmp_path_factory: pytest.TempPathFactory, max_tokens: int, length: int
) -> None:
    """Wherever the bound falls: inside a draft, at the edge of a block, right behind the prompt."""
    folder = tmp_path_factory.mktemp("s")
    params, prompt = replace(GREEDY, max_tokens=max_tokens), (PROMPT * 2)[:length]
    plain, _ = reply(folder / "plain", params, speculate=False, prompt=prompt)
    drafted, _ = reply(folder / "drafted", params, speculate=True, prompt=prompt)
    assert drafted == plain


@pytest.mark.parametrize("start", [1, 20, 33, 34, 35, 36, 37, 38, 60])
def test_nothing_behind_a_stop_string_is_shown_or_counted(tmp_path: Path, start: int) -> None:
    params = replace(GREEDY, max_tokens=100, top_logprobs=0)
    whole, _ = reply(tmp_path / "whole", params, speculate=False)
    params = replace(params, stop=(whole[0][start : start + 3],))
    plain, _ = reply(tmp_path / "plain", params, speculate=False)
    drafted, _ = reply(tmp_path / "drafted", params, speculate=True)
    assert drafted == plain
    assert plain[2].stop is not None


def test_preempted_and_speculating(tmp_path: Path) -> None:
    params = replace(GREEDY, max_tokens=90)
    texts: dict[bool, list[str]] = {}
    for speculate in (False, True):
        runtime = QuotingRuntime(13)
        with opened(tmp_path / str(speculate), runtime=runtime, speculate=speculate) as client:
            calls = [client.submit(PROMPT + name, replace(params, seed=1), agent=name) for name in "abcde"]
            for call in calls:
                call.finished()
            stats = client.engine.stats()
        texts[speculate] = [call.text for call in calls]
        assert stats.preemptions > 0
    assert stats.accepted_tokens > 0
    assert texts[True] == texts[False]


def test_the_context_is_filled_to_the_last_token(tmp_path: Path) -> None:
    for num_pages in (4, 5):
        ends = []
        for speculate in (False, True):
            runtime = QuotingRuntime(num_pages)
            folder = tmp_path / f"{num_pages} {speculate}"
            with opened(folder, runtime=runtime, speculate=speculate) as client:
                ends.append(client.ask(PROMPT, max_tokens=1000))
        assert ends[0] == ends[1]
        assert len(PROMPT + ends[0][0]) == 16 * (num_pages - 1)


def test_it_saves_steps(tmp_path: Path) -> None:
    steps = {}
    for speculate in (False, True):
        runtime = QuotingRuntime()
        with opened(tmp_path / str(speculate), runtime=runtime, speculate=speculate) as client:
            client.ask(PROMPT, max_tokens=200)
        steps[speculate] = len(runtime.plans)
    assert steps[False] == 200
    assert steps[True] < 150


def test_where_nothing_is_quoted_nothing_is_drafted_for_long(tmp_path: Path) -> None:
    runtime = GatedRuntime(64)
    runtime.run_freely()
    with opened(tmp_path, runtime=runtime) as client:
        client.ask(PROMPT, max_tokens=400)
        assert client.engine.stats().drafted_tokens < 20


class NaNLater(QuotingRuntime):
    """Computes NaN from 70 tokens on."""

    def _logits(self, pages: tuple[int, ...], num_tokens: int) -> NDArray[np.float32]:
        row = super()._logits(pages, num_tokens)
        if num_tokens >= 70:
            row[5] = np.nan
        return row


def test_nan_in_a_draft_fails_where_it_would_fail(tmp_path: Path) -> None:
    texts = []
    for speculate in (False, True):
        with opened(tmp_path / str(speculate), runtime=NaNLater(), speculate=speculate) as client:
            call = client.submit(PROMPT, replace(GREEDY, max_tokens=100))
            assert isinstance(call.failed().error, ModelOutputInvalid)
            texts.append(call.text)
    assert texts[0] == texts[1]
    assert len(PROMPT + texts[0]) == 70


class PeriodicRuntime(QuotingRuntime):
    """Says what stood 11 tokens before."""

    def _logits(self, pages: tuple[int, ...], num_tokens: int) -> NDArray[np.float32]:
        row = FakeRuntime._logits(self, pages, num_tokens)
        row[self.token_at(pages, num_tokens - 11)] += 100
        return row


def test_an_end_token_inside_a_draft_ends_the_reply(tmp_path: Path) -> None:
    """Prompts are full of end tokens: each turn of a conversation has one."""
    turn = (*encode("abcdefghij"), EOS)
    prompt = turn * 3 + turn[:4]
    with opened(tmp_path, runtime=PeriodicRuntime()) as client:
        call = client.submit(prompt, replace(GREEDY, max_tokens=22))
        usage = call.finished().usage
        stats = client.engine.stats()
    assert call.text == "efghij"
    assert usage.completion_tokens == stats.generated_tokens == 7
    assert stats.drafted_tokens > stats.accepted_tokens > 0
