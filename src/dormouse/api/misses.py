"""Anthropic's cache diagnostics: what of a request changed since the reply that it follows."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from dormouse.domain.conversation import Conversation, Role
from dormouse.domain.requests import Usage

_MOST_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Sent:
    """What a request consisted of; `keys` name its conversation after each message."""

    model: str
    conversation: Conversation
    keys: tuple[bytes, ...]

    @property
    def system(self) -> tuple[str, ...]:
        """The system prompt at the head of the conversation."""
        messages = self.conversation.messages
        head = next((i for i, m in enumerate(messages) if m.role is not Role.SYSTEM), len(messages))
        return tuple(message.text for message in messages[:head])


@dataclass(frozen=True, slots=True)
class Miss:
    """The reason for a miss, None where the prefix is as it was."""

    reason: str | None

    def render(self, used: Usage) -> dict[str, Any]:
        """As the response shows it."""
        missed = used.prompt_tokens - used.cached_tokens
        if self.reason is None:
            return {"cache_miss_reason": None}
        return {"cache_miss_reason": {"type": self.reason, "cache_missed_input_tokens": missed}}


class Misses:
    """The requests answered last, by tenant and message id. Owned by the event loop."""

    def __init__(self) -> None:
        self._sent: OrderedDict[tuple[str, str], _Digest] = OrderedDict()

    def remember(self, tenant: str, message_id: str, sent: Sent) -> None:
        """A request that is being answered under `message_id`."""
        self._sent[tenant, message_id] = _Digest.of(sent)
        if len(self._sent) > _MOST_REMEMBERED:
            self._sent.popitem(last=False)

    def why(self, tenant: str, previous_id: str | None, sent: Sent) -> Miss | None:
        """What changed since the request answered as `previous_id`; None when nobody asks."""
        if previous_id is None:
            return None
        before = self._sent.get((tenant, previous_id))
        if before is None:
            return Miss("previous_message_not_found")
        now = _Digest.of(sent)
        if before.model != now.model:
            return Miss("model_changed")
        if before.tools != now.tools:
            return Miss("tools_changed")
        if before.system != now.system:
            return Miss("system_changed")
        return Miss(None if before.last_key in sent.keys else "messages_changed")


@dataclass(frozen=True, slots=True)
class _Digest:
    """As much of a request as is needed to compare; no texts are kept."""

    model: str
    tools: int
    system: int
    last_key: bytes

    @classmethod
    def of(cls, sent: Sent) -> _Digest:
        last = sent.keys[-1] if sent.keys else b""
        return cls(sent.model, hash(repr(sent.conversation.tools)), hash(sent.system), last)
