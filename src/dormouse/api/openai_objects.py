"""What OpenAI's chat and completion routes have in common on the wire."""

from __future__ import annotations

import time
import uuid
from typing import Any

from dormouse.api.answer import StopReason
from dormouse.domain.requests import Usage
from dormouse.models.served import ServedModel

FINISH = {
    StopReason.END: "stop",
    StopReason.CALLS: "tool_calls",
    StopReason.STOP_STRING: "stop",
    StopReason.MAX_TOKENS: "length",
    StopReason.CONTEXT_FULL: "length",
}


class Envelope:
    """The fields around the choices: the same id and time in every chunk of a stream.

    `kind` is the object's name; a stream of chat completions appends `.chunk`.
    """

    def __init__(self, served: ServedModel, prefix: str, *, includes_usage: bool) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._fingerprint = served.fingerprint
        self._model = served.name
        self._includes_usage = includes_usage
        self._created = int(time.time())

    def whole(self, kind: str, choices: list[dict[str, Any]], used: dict[str, Any]) -> dict[str, Any]:
        """A body that was not streamed."""
        return self._object(kind, choices) | {"usage": used}

    def chunk(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A part of a stream. In one that ends with usage, every other chunk says that it has none."""
        body = self._object(kind, choices)
        return body | {"usage": None} if self._includes_usage else body

    def last(self, kind: str, used: dict[str, Any]) -> list[dict[str, Any]]:
        """What a stream ends with: usage where it was asked for, and only there."""
        return [self._object(kind, []) | {"usage": used}] if self._includes_usage else []

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }


def usage(used: Usage, reasoning_tokens: int = 0) -> dict[str, Any]:
    """OpenAI's usage. Where cached tokens were found is told beside their number."""
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": used.cached_tokens,
            "memory_tokens": used.memory_tokens,
            "disk_tokens": used.disk_tokens,
        },
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }
