"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

from typing import Any

from dormouse.domain.requests import TokenLogprob
from dormouse.models.chat import ChatModel


def chat_logprobs(chat: ChatModel, entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""
    content = [
        _entry(chat, entry.token_id, entry.logprob)
        | {"top_logprobs": [_entry(chat, token, logprob) for token, logprob in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    chat: ChatModel, entries: tuple[TokenLogprob, ...], offset: int
) -> tuple[dict[str, Any], int]:
    """`choices[].logprobs` of a completion, whose text starts at `offset`; and where it ends."""
    tokens, offsets = [], []
    for entry in entries:
        text = chat.token_text(entry.token_id)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
    rendered = {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{chat.token_text(token): p for token, p in entry.top} for entry in entries],
        "text_offset": offsets,
    }
    return rendered, offset


def _entry(chat: ChatModel, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": chat.token_text(token),
        "logprob": logprob,
        "bytes": list(chat.token_bytes(token)),
    }
