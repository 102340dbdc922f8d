"""Token-exact history: replies that a client replays as text go into the prompt as the tokens they were.

Tokenizing a reply's text again may give other tokens than those that were generated, and a prefix would end
there. Where a replayed message is one that we remember, its tokens are spliced in and only what is around
them is tokenized. Found by what the conversation was up to there, so the same words in another conversation
are another reply.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise

from dormouse.domain.conversation import Conversation, Message, Role

Span = str | tuple[int, ...]
"""Text that is to be tokenized, or tokens as they are."""

_KEY_NBYTES = 32


@dataclass(frozen=True, slots=True)
class RememberedReply:
    """Tokens of a reply without its end-of-turn token, and the text they show, markup included."""

    tokens: tuple[int, ...]
    text: str
    has_reasoning: bool


def conversation_keys(messages: Sequence[Message], before: bytes = b"") -> Iterator[bytes]:
    """After each message, a name for the conversation so far.

    What clients change between turns is left out: reasoning, call ids, space around texts, and the order
    of keys in arguments.
    """
    key = before
    for message in messages:
        calls = [[call.name, call.parsed()] for call in message.calls]
        meant = [message.role, message.text.strip(), calls]
        packed = json.dumps(meant, sort_keys=True, ensure_ascii=True).encode()
        key = blake2b(key + packed, digest_size=_KEY_NBYTES).digest()
        yield key


def spliced(
    conversation: Conversation,
    rendered: str,
    render: Callable[[Conversation], str],
    recall: Callable[[bytes], RememberedReply | None],
    decode: Callable[[Sequence[int]], str],
) -> list[Span]:
    """`rendered`, the prompt of `conversation`, with the tokens of remembered replies in place of their text.

    Whatever does not fit stays text: then only a prefix is lost, never a word.
    """
    replies = _remembered(conversation, recall)
    if not replies:
        return [rendered]
    # Where a message stands in the prompt is found by rendering another one in its place.
    nonce = secrets.token_hex(8)
    marks = {index: f"\ue000{nonce}:{index}\ue001" for index in replies}
    messages = [
        replace(message, text=marks[index], reasoning="", calls=()) if index in marks else message
        for index, message in enumerate(conversation.messages)
    ]
    framed = render(replace(conversation, messages=tuple(messages)))
    spans: list[Span] = []
    at = 0
    for index, start, end in _segments(rendered, framed, marks):
        inside = _fit(conversation.messages[index], rendered[start:end], replies[index], decode)
        if inside is not None:
            spans += [rendered[at:start], *inside]
            at = end
    spans.append(rendered[at:])
    return _joined(spans)


def _remembered(
    conversation: Conversation, recall: Callable[[bytes], RememberedReply | None]
) -> dict[int, RememberedReply]:
    found = {}
    for index, key in enumerate(conversation_keys(conversation.messages)):
        if conversation.messages[index].role is Role.ASSISTANT:
            reply = recall(key)
            if reply is not None and reply.text:
                found[index] = reply
    return found


def _segments(rendered: str, framed: str, marks: dict[int, str]) -> Iterator[tuple[int, int, int]]:
    """Where in `rendered` each marked message stands: its index, start and end.

    Stops at the first one that the template treats in another way than a marked one.
    """
    places = list(_places(framed, marks))
    at = 0
    for (index, begin, found), (_, _, following) in pairwise([*places, (-1, 0, len(framed))]):
        before = framed[begin:found]
        # What follows up to the next mark, or to the end of the prompt, ends this message.
        after = framed[found + len(marks[index]) : following]
        if not after or not rendered.startswith(before, at):
            return
        start = at + len(before)
        end = rendered.find(after, start)
        if end < 0:
            return
        yield index, start, end
        at = end


def _places(framed: str, marks: dict[int, str]) -> Iterator[tuple[int, int, int]]:
    """Of each mark, while they come in order: its index, where what is before it begins, and where it is."""
    at = 0
    for index, mark in marks.items():
        found = framed.find(mark, at)
        if found < 0:
            return
        yield index, at, found
        at = found + len(mark)


def _fit(
    message: Message, segment: str, reply: RememberedReply, decode: Callable[[Sequence[int]], str]
) -> list[Span] | None:
    """The message's part of the prompt with the reply's tokens in it; None where they do not belong."""
    for text in (reply.text, reply.text.strip()):
        start = segment.find(text)
        if start >= 0:
            return [segment[:start], reply.tokens, segment[start + len(text) :]]
    if message.calls:
        return _fit_calls(message, segment, reply)
    return _fit_answer(message.text.strip(), segment, reply, decode)


def _fit_calls(message: Message, segment: str, reply: RememberedReply) -> list[Span] | None:
    """Calls are rendered by the template in its own spelling: what was generated is the truth, as long as the
    segment says all of it and no more. Reasoning that may have been dropped stays so."""
    said = message.text.strip()
    has_all = said in segment and all(call.name in segment for call in message.calls)
    return [reply.tokens] if has_all and not reply.has_reasoning else None


def _fit_answer(
    answer: str, segment: str, reply: RememberedReply, decode: Callable[[Sequence[int]], str]
) -> list[Span] | None:
    """The template dropped the reasoning: the tokens of the answer alone."""
    start = segment.find(answer)
    if not answer or start < 0 or not reply.text.rstrip().endswith(answer):
        return None
    # The answer begins at a token, or it stays text.
    low, high = 0, len(reply.tokens)
    while low < high:
        middle = (low + high) // 2
        if len(decode(reply.tokens[middle:]).strip()) > len(answer):
            low = middle + 1
        else:
            high = middle
    tokens = reply.tokens[low:]
    if decode(tokens).strip() != answer:
        return None
    return [segment[:start], tokens, segment[start + len(answer) :]]


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Texts that meet are one, as they are tokenized together."""
    out: list[Span] = []
    for span in spans:
        if isinstance(span, str) and out and isinstance(out[-1], str):
            out[-1] += span
        elif span:
            out.append(span)
    return out
