"""Each knob of the sampler does what its name says, and nothing to the neighbours."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.domain.requests import SamplingParams
from dormouse.engine.distribution import Row, token_logprob
from dormouse.engine.sampler import Sampler

EOS = frozenset({0})


def row(*values: float) -> Row:
    return np.array(values, np.float32)


def draws(params: SamplingParams, logits: Row, count: int = 400) -> Counter[int]:
    sampler = Sampler(params, [], EOS)
    return Counter(sampler.sample(logits.copy())[0] for _ in range(count))


def test_greedy_takes_the_best() -> None:
    assert Sampler(SamplingParams(temperature=0), [], EOS).sample(row(1, 3, 2))[0] == 1


def test_temperature_follows_the_distribution() -> None:
    logits = np.log(row(0.5, 0.3, 0.2))
    counts = draws(SamplingParams(seed=1), logits, 4000)
    assert [round(counts[i] / 4000, 1) for i in range(3)] == [0.5, 0.3, 0.2]


def test_low_temperature_sharpens() -> None:
    logits = np.log(row(0.6, 0.4))
    assert draws(SamplingParams(seed=1, temperature=0.1), logits)[0] > 380


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(seed=3, top_k=2), {2, 3}),
        (SamplingParams(seed=3, top_p=0.5), {3}),
        (SamplingParams(seed=3, top_p=0.55), {2, 3}),
        (SamplingParams(seed=3, min_p=0.5), {2, 3}),
        (SamplingParams(seed=3, top_k=99), {0, 1, 2, 3}),
        (SamplingParams(seed=3, top_p=0.0001), {3}),
    ],
)
def test_truncation_keeps_only_the_best(params: SamplingParams, allowed: set[int]) -> None:
    assert set(draws(params, np.log(row(0.05, 0.15, 0.3, 0.5)))) == allowed


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=1), [2], EOS)
    taken = [sampler.sample(row(0, 1.0, 1.5, 0.9))[0] for _ in range(4)]
    assert taken == [2, 1, 3, 2], "2 is in the prompt and still taken first; then each costs 1 once"
    sampler = Sampler(SamplingParams(temperature=0, frequency_penalty=1), [], EOS)
    assert [sampler.sample(row(-9, 1.5, 0.9))[0] for _ in range(4)] == [1, 2, 1, 2]


def test_repetition_counts_the_prompt_too() -> None:
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=2), [1], EOS)
    assert sampler.sample(row(-9, 1.5, 1.0))[0] == 2
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=2), [1], EOS)
    assert sampler.sample(row(-9, -0.6, -1.0))[0] == 2, "negative logits get worse, not better"


def test_logit_bias_adds() -> None:
    params = SamplingParams(temperature=0, logit_bias=((2, 100.0), (1, -100.0)))
    assert Sampler(params, [], EOS).sample(row(0, 5, 0))[0] == 2


def test_min_tokens_holds_the_end_down() -> None:
    sampler = Sampler(SamplingParams(temperature=0, min_tokens=2), [], EOS)
    assert [sampler.sample(row(9, 1))[0] for _ in range(3)] == [1, 1, 0]
    sampler = Sampler(SamplingParams(temperature=0, ignore_eos=True), [], EOS)
    assert [sampler.sample(row(9, 1))[0] for _ in range(3)] == [1, 1, 1]


def test_a_seed_fixes_the_stream_whatever_else_is_drawn() -> None:
    logits = np.zeros(50, np.float32)

    def stream(noise: int) -> list[int]:
        sampler = Sampler(SamplingParams(seed=7), [], EOS)
        other = Sampler(SamplingParams(seed=8), [], EOS)
        taken = []
        for _ in range(10):
            for _ in range(noise):
                other.sample(logits.copy())
            taken.append(sampler.sample(logits.copy())[0])
        return taken

    assert stream(0) == stream(3)
    assert len(set(stream(0))) > 3


def test_without_a_seed_streams_differ() -> None:
    logits = np.zeros(1000, np.float32)
    a, b = (Sampler(SamplingParams(), [], EOS) for _ in range(2))
    assert [a.sample(logits.copy())[0] for _ in range(8)] != [b.sample(logits.copy())[0] for _ in range(8)]


def test_logprobs_are_of_the_model_not_of_the_penalties() -> None:
    params = SamplingParams(temperature=0, top_logprobs=2, logit_bias=((1, 100.0),))
    token, logprob = Sampler(params, [], EOS).sample(np.log(row(0.7, 0.1, 0.2)))
    assert token == 1
    assert logprob is not None
    assert math.isclose(logprob.logprob, math.log(0.1), rel_tol=1e-5)
    assert [i for i, _ in logprob.top] == [0, 2]


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40), st.integers(0, 2**64 - 1))
def test_whatever_is_drawn_was_possible(values: list[float], seed: int) -> None:
    logits = row(*values)
    params = SamplingParams(seed=seed, top_p=0.9, top_k=5, min_p=0.01, temperature=0.7)
    token, _ = Sampler(params, [], frozenset()).sample(logits.copy())
    assert logits[token] >= np.sort(logits)[-min(5, len(values))]


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20))
def test_logprobs_sum_to_one(values: list[float]) -> None:
    entry = token_logprob(row(*values), 0, len(values))
    assert math.isclose(sum(math.exp(p) for _, p in entry.top), 1, rel_tol=1e-6)
    assert [p for _, p in entry.top] == sorted((p for _, p in entry.top), reverse=True)
