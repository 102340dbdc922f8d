"""What is guessed, how sure the guesser is, and how many guesses a step computes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.engine import drafts
from dormouse.engine.drafts import MOST_DRAFTED, Drafter, draft_lengths


def drafter_of(prompt: list[int], reply: list[int]) -> Drafter:
    """One that has read a prompt, then a reply token by token."""
    drafter, tokens = Drafter(), prompt.copy()
    drafter.read(tokens, len(prompt))
    for token in reply:
        tokens.append(token)
        drafter.read(tokens, len(prompt))
    return drafter


def test_what_followed_the_last_time_is_the_guess() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    assert drafter_of(tokens, []).draft(tokens, 4) == (4, 5, 6, 7)
    assert drafter_of(tokens[:4], tokens[4:]).draft(tokens, 4) == (4, 5, 6, 7)
    assert not drafter_of(tokens[:9], []).has_guess


def test_the_latest_occurrence_counts_and_a_run_stays_where_it_is() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 8, 9]
    assert drafter_of(prompt, [1, 2, 3]).draft([*prompt, 1, 2, 3], 2) == (7, 8)
    # 4 was no guess of the later place, so the earlier one is found by 2, 3, 4, and kept to from there.
    assert drafter_of(prompt, [1, 2, 3, 4, 5]).draft([*prompt, 1, 2, 3, 4, 5], 2) == (6, 1)


def test_a_run_that_reaches_the_present_repeats_itself() -> None:
    tokens = [5, 6, 7, 5, 6, 7]
    assert drafter_of(tokens, []).draft(tokens, 7) == (5, 6, 7, 5, 6, 7, 5)


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(0, 30))
def test_a_prompt_in_pieces_is_read_as_in_one(tokens: list[int], num_prompt: int) -> None:
    num_prompt = min(num_prompt, len(tokens))
    whole = drafter_of(tokens[:num_prompt], tokens[num_prompt:])
    pieces = Drafter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafts, "_MOST_INDEXED", 4)
        for _ in range(9):
            pieces.read(tokens, num_prompt)
    assert pieces.draft(tokens, 5) == whole.draft(tokens, 5)
    assert pieces.chance == whole.chance


def test_chance_follows_what_comes() -> None:
    source = random.Random(1).choices(range(1000), k=60)
    assert drafter_of(source, source).chance > 0.95
    shuffled = [token for i in range(0, 57, 3) for token in (*source[i : i + 3], 1001)]
    assert drafter_of(source, shuffled).chance < 0.2


def test_more_is_drafted_the_surer_a_guess_is() -> None:
    lengths = [draft_lengths([chance], [MOST_DRAFTED], 1, 0)[0] for chance in (0.1, 0.5, 0.8, 0.9, 1.0)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] == MOST_DRAFTED


def test_many_rows_make_a_guess_dear() -> None:
    alone, among_few, among_many = (
        draft_lengths([0.7] * count, [MOST_DRAFTED] * count, count, 0)[0] for count in (1, 3, 32)
    )
    assert alone > among_few > among_many == 0


def test_the_surer_sequences_get_the_rows() -> None:
    lengths = draft_lengths([0.3, 0.95, 0.3], [MOST_DRAFTED] * 3, 12, 0)
    assert lengths[1] > 0
    assert lengths[::2] == [0, 0]


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(-1, 20)), max_size=70), st.integers(0, 600))
def test_drafts_fit_their_room_and_the_step(sequences: list[tuple[float, int]], num_prefill: int) -> None:
    chances, rooms = [c for c, _ in sequences], [r for _, r in sequences]
    lengths = draft_lengths(chances, rooms, len(sequences), num_prefill)
    assert all(0 <= length <= max(0, room) for length, room in zip(lengths, rooms, strict=True))
    assert sum(lengths) <= 24, "what prompts are computed beside is never much longer for it"
