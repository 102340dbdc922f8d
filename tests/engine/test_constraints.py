"""Replies kept to a grammar: masks before sampling, free neighbours, speculation, pressure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from tests.engine.harness import GREEDY, Client, opened

from dormouse.domain.errors import ConstraintBroken
from dormouse.domain.requests import FinishReason, SamplingParams
from dormouse.runtimes.fake import EOS, encode

DIGITS = frozenset(encode("0123456789"))
SAMPLED = SamplingParams(temperature=1.5, seed=7, max_tokens=60)
PENALIZED = replace(
    SAMPLED,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.2,
    logit_bias=((encode("a")[0], 50.0),),
    top_p=0.9,
    min_p=0.01,
)


@dataclass
class Slots:
    """Implements `Constraint`: at each place one of some tokens, at the end only the end."""

    slots: Sequence[frozenset[int]]
    breaks_at: int | None = None
    taken: list[int] = field(default_factory=list)

    def fill_mask(self, mask: memoryview) -> None:
        words = np.frombuffer(mask, np.uint32)
        words[:] = 0
        for token in self._allowed():
            words[token // 32] |= np.uint32(1 << token % 32)

    def took(self, token: int) -> bool:
        allowed = token in self._allowed()
        self.taken.append(token)
        return allowed

    def forced(self) -> Sequence[int]:
        run: list[int] = []
        for slot in self.slots[len(self.taken) :]:
            if len(slot) > 1:
                break
            run += slot
        return run

    def _allowed(self) -> frozenset[int]:
        place = len(self.taken)
        if place == self.breaks_at:
            return frozenset()
        return self.slots[place] if place < len(self.slots) else frozenset({EOS})


def text(literal: str) -> list[frozenset[int]]:
    return [frozenset({token}) for token in encode(literal)]


def dated() -> Slots:
    return Slots([*text('{"year": '), *[DIGITS] * 4, *text(', "month": '), *[DIGITS] * 2, *text("}")])


def ask(client: Client, sampling: SamplingParams, constraint: Slots | None, prompt: str = "When?") -> str:
    call = client.submit(prompt, sampling, constraint=constraint)
    assert call.finished().reason is FinishReason.STOP or constraint is None
    return call.text


@pytest.mark.parametrize("sampling", [replace(GREEDY, max_tokens=60), SAMPLED, PENALIZED])
def test_a_reply_keeps_to_its_grammar_with_and_without_speculation(
    tmp_path: Path, sampling: SamplingParams
) -> None:
    replies = []
    for speculate in (False, True):
        constraint = dated()
        with opened(tmp_path / str(speculate), speculate=speculate) as client:
            replies.append(ask(client, sampling, constraint))
            stats = client.engine.stats()
        assert stats.accepted_tokens > 10 if speculate else stats.drafted_tokens == 0
        assert constraint.taken == [*encode(replies[-1]), EOS]
    assert replies[0] == replies[1]
    assert replies[0][:9] == '{"year": '
    assert replies[0][9:13].isdigit()


def test_free_neighbours_are_unchanged_to_the_bit(tmp_path: Path) -> None:
    free = replace(SAMPLED, max_tokens=40, top_logprobs=3)

    def free_reply(folder: Path, num_constrained: int) -> list[object]:
        with opened(folder, num_pages=64) as client:
            calls = [client.submit("Tell me.", free)]
            calls += [
                client.submit(f"When {n}?", SAMPLED, constraint=dated()) for n in range(num_constrained)
            ]
            ends = [call.finished() for call in calls]
            assert all(end.tokens[-1] == EOS for end in ends[1:])
            return [ends[0].tokens, calls[0].text, calls[0].logprobs]

    assert free_reply(tmp_path / "alone", 0) == free_reply(tmp_path / "beside", 5)


def test_held_down_ends_come_where_nothing_else_may(tmp_path: Path) -> None:
    held = replace(GREEDY, max_tokens=60, min_tokens=50, ignore_eos=True)
    with opened(tmp_path) as client:
        call = client.submit("When?", held, constraint=dated())
        finished = call.finished()
    assert finished.reason is FinishReason.STOP
    assert finished.tokens[-1] == EOS
    assert len(finished.tokens) < 50


def test_log_probabilities_are_those_of_the_model(tmp_path: Path) -> None:
    sampling = replace(GREEDY, max_tokens=1, top_logprobs=5)
    with opened(tmp_path) as client:
        free = client.submit("When?", sampling)
        free.finished()
        kept = client.submit("When?", sampling, constraint=dated())
        tokens = kept.finished().tokens
    assert tokens == encode("{")
    assert free.logprobs[0].top == kept.logprobs[0].top
    assert kept.logprobs[0].token_id == tokens[0]
    assert kept.logprobs[0].logprob < free.logprobs[0].logprob


@pytest.mark.parametrize("speculate", [False, True])
def test_a_broken_grammar_ends_its_reply_and_no_other(tmp_path: Path, speculate: bool) -> None:
    with opened(tmp_path, speculate=speculate) as client:
        neighbour = client.submit("Tell me.", replace(GREEDY, max_tokens=30))
        breaking = replace(dated(), breaks_at=12)
        broken = client.submit("When?", replace(GREEDY, max_tokens=60), constraint=breaking)
        failed = broken.failed()
        assert isinstance(failed.error, ConstraintBroken)
        assert broken.text.startswith('{"year": ')
        assert neighbour.finished().reason is FinishReason.LENGTH
        assert client.ask("Still there?")[0]


def test_preemption_keeps_the_place_in_the_grammar(tmp_path: Path) -> None:
    long = [*text('{"n": "'), *[DIGITS] * 40, *text('"}')]
    sampling = replace(SAMPLED, max_tokens=100)
    prompts = [f"{n} " * 20 for n in range(3)]
    with opened(tmp_path / "wide", num_pages=64) as client:
        expected = [ask(client, sampling, Slots(long), prompt) for prompt in prompts]
    with opened(tmp_path / "narrow", num_pages=14) as client:
        calls = [client.submit(prompt, sampling, constraint=Slots(long)) for prompt in prompts]
        assert [call.finished().reason for call in calls] == [FinishReason.STOP] * 3
        assert client.engine.stats().preemptions > 0
    assert [call.text for call in calls] == expected
