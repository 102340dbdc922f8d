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
from dormouse.engine.sampler import Sampler, choose

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


def plainly(logits: Row, p: SamplingParams, uniform: float) -> int:
    """One row's draw as the definitions say it, without any shortcut."""
    values = (logits - logits.max()) / np.float32(p.temperature)
    if 0 < p.top_k < len(values):
        values = np.where(values < np.sort(values)[-p.top_k], -np.inf, values)
    if p.top_p < 1:
        order = np.argsort(-values, kind="stable")
        weights = np.exp(values[order]).astype(np.float64)
        before = weights.cumsum() - weights
        kept = order[: max(1, int((before < p.top_p * weights.sum()).sum()))]
        values = np.where(np.isin(np.arange(len(values)), kept), values, -np.inf)
    if p.min_p:
        values = np.where(values < np.log(p.min_p), -np.inf, values)
    cumulative = np.exp(values).astype(np.float64).cumsum()
    return int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))


@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([5, 256, 700, 49152]),
    top_k=st.sampled_from([0, 1, 3, 50, 900]),
    top_p=st.sampled_from([1.0, 0.999, 0.95, 0.5, 0.01, 0.0]),
    min_p=st.sampled_from([0.0, 0.02, 1.0]),
    temperature=st.sampled_from([0.1, 0.8, 1.0, 2.0]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
)
def test_the_shortcuts_change_no_draw(
    seed: int, vocab_size: int, top_k: int, top_p: float, min_p: float, temperature: float, spread: float
) -> None:
    logits = np.random.default_rng(seed).normal(0, spread, (3, vocab_size)).astype(np.float32)
    # Ties, as a model of few bits has them.
    logits = np.round(logits, 1) if seed % 2 else logits
    params = SamplingParams(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    samplers = [Sampler(params, [], EOS) for _ in logits]
    expected = [plainly(row, params, s.uniforms(1)[0]) for row, s in zip(logits, samplers, strict=True)]
    assert choose(logits, [(s, ()) for s in samplers]).tokens == expected


def test_neighbours_change_no_draw() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (19, 49152)).astype(np.float32)
    many = (
        SamplingParams(temperature=0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_p=0.95),
        SamplingParams(seed=3, top_k=40, frequency_penalty=1),
    )
    together = [Sampler(many[i % 4], [], EOS) for i in range(19)]
    alone = [Sampler(many[i % 4], [], EOS) for i in range(19)]
    tokens = choose(logits.copy(), [(sampler, ()) for sampler in together]).tokens
    assert tokens == [s.sample(row)[0] for s, row in zip(alone, logits.copy(), strict=True)]


@pytest.mark.parametrize("seed", [None, 5])
def test_rows_of_a_draft_are_those_of_single_steps(seed: int | None) -> None:
    """Penalties count the draft before a row, and every row has its own number of the random stream."""
    logits = np.random.default_rng(2).normal(0, 1, (6, 40)).astype(np.float32)
    params = SamplingParams(
        seed=seed, temperature=1.0 if seed else 0.0, frequency_penalty=1, repetition_penalty=1.5, min_tokens=4
    )
    single = Sampler(params, [1, 2], EOS)
    expected = [single.sample(row.copy())[0] for row in logits]
    drafting = Sampler(params, [1, 2], EOS)
    choices = choose(logits.copy(), [(drafting, tuple(expected[:-1]))])
    assert choices.tokens == expected
    wrong = choose(logits[:3].copy(), [(drafting, (39, 38))])
    assert wrong.tokens[0] == expected[0], "what was not taken has changed nothing"


def test_numbers_that_are_none_are_seen_in_their_row_only() -> None:
    logits = np.zeros((4, 300), np.float32)
    logits[0, 7] = np.nan
    logits[1, 8] = np.inf
    logits[2] = -np.inf
    samplers = [Sampler(SamplingParams(seed=1, top_p=0.9), [], EOS) for _ in logits]
    assert choose(logits, [(s, ()) for s in samplers]).is_valid == [False, False, False, True]
