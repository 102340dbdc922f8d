"""Stop strings end a reply and never leak, however the text is cut into tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dormouse.domain.requests import TokenLogprob
from dormouse.engine.detokenizer import Detokenizer


class Pieces:
    """A decoder whose token i is the i-th piece of a text."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self.pieces = pieces
        self.rest = rest

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return self.rest


def run(pieces: list[str], stops: list[str], rest: str = "") -> tuple[str, str | None]:
    detokenizer = Detokenizer(Pieces(pieces, rest), stops)
    shown = ""
    for token in range(len(pieces)):
        now = detokenizer.step(token)
        shown += now.text
        if now.stop is not None:
            return shown, now.stop
    last = detokenizer.flush()
    return shown + last.text, last.stop


@given(
    st.lists(st.text("ab", max_size=3), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
)
def test_logprobs_are_those_of_the_text_that_is_shown(pieces: list[str], stops: list[str]) -> None:
    """They come with their text or later, in order, and none is of a stop string."""
    detokenizer = Detokenizer(Pieces(pieces), stops)
    text, shown = "", 0
    for token in range(len(pieces)):
        step = detokenizer.step(token, TokenLogprob(token, 0.0))
        text += step.text
        assert [entry.token_id for entry in step.logprobs] == [*range(shown, shown + len(step.logprobs))]
        shown += len(step.logprobs)
        assert len("".join(pieces[:shown])) <= len(text)
        if step.stop is not None:
            return
    rest = detokenizer.flush()
    assert shown + len(rest.logprobs) == len(pieces)


def test_text_passes_when_nothing_stops_it() -> None:
    assert run(["ab", "c"], []) == ("abc", None)
    assert run(["ab"], ["x"], rest="c") == ("abc", None)


def test_a_stop_string_across_tokens_is_cut() -> None:
    assert run(["hello E", "N", "D there"], ["END"]) == ("hello ", "END")


def test_what_only_looked_like_a_stop_is_shown() -> None:
    assert run(["a E", "N", "x"], ["END"]) == ("a ENx", None)
    assert run(["a E", "N"], ["END"]) == ("a EN", None)


def test_the_earliest_stop_wins() -> None:
    assert run(["one two"], ["two", "one"]) == ("", "one")


def test_a_stop_in_the_rest_still_counts() -> None:
    assert run(["a"], ["b"], rest="b!") == ("a", "b")


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
)
def test_cutting_equals_searching_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    shown, stop = run(pieces, stops)
    whole = "".join(pieces)
    ends = [whole.find(s) for s in stops if s in whole]
    if not ends:
        assert (shown, stop) == (whole, None)
    else:
        # Tokens arrive in order, so the stop that completes first wins over one that began earlier.
        assert stop in stops
        assert whole.startswith(shown + stop)
        assert not any(s in shown for s in stops)
