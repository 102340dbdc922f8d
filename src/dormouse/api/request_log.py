"""One log line per request that has ended. Never what was said, nor what a header held, but for its id."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from dormouse.api.call import Call, Reply
from dormouse.api.errors import status_of
from dormouse.domain.requests import Failed, Finished

log = logging.getLogger(__name__)

_QUIET_ROUTES = frozenset({"/health", "/health/live", "/health/ready", "/health/startup", "/metrics"})
"""Asked every few seconds by machines; their lines are for debugging."""


def log_call(call: Call) -> None:
    """Log an ended call: text for people, the same as `fields` for programs."""
    level = logging.DEBUG if call.route in _QUIET_ROUTES else logging.INFO
    if log.isEnabledFor(level):
        fields = fields_of(call)
        log.log(level, "%s", _sentence(call, fields), extra={"fields": fields})


def fields_of(call: Call) -> dict[str, Any]:
    """What is known of an ended call. Durations are in seconds; what does not apply is left out.

    Of several replies to one request tokens are added up; all else is the first one's.
    """
    fields: dict[str, Any] = {
        "method": call.known_method,
        "route": call.route,
        "status": call.status,
        "dialect": call.dialect,
        "tenant": call.caller.tenant if call.caller else None,
        "key": call.caller.key if call.caller else None,
        "duration_s": round(call.ended_at - call.started_at, 6),
    }
    if call.first_text_at is not None:
        fields["first_text_s"] = round(call.first_text_at - call.started_at, 6)
    if call.replies:
        fields |= _reply_fields(call.replies[0])
    if len(call.replies) > 1:
        fields["replies"] = len(call.replies)
    usages = [reply.end.usage for reply in call.replies if isinstance(reply.end, Finished)]
    if usages:
        fields |= {
            "computed_tokens": sum(used.prompt_tokens - used.cached_tokens for used in usages),
            "memory_tokens": sum(used.memory_tokens for used in usages),
            "disk_tokens": sum(used.disk_tokens for used in usages),
            "generated_tokens": sum(used.completion_tokens for used in usages),
        }
    return {name: value for name, value in fields.items() if value is not None}


def _reply_fields(reply: Reply) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": reply.model,
        "agent": reply.request.agent,
        "reply": reply.request.id,
        "outcome": reply.outcome,
        "prompt_tokens": len(reply.request.prompt),
    }
    if isinstance(reply.end, Finished):
        fields |= {name: round(s, 6) for name, s in dataclasses.asdict(reply.end.timings).items()}
    elif isinstance(reply.end, Failed):
        # Its code, not its message: that may quote what was sent.
        fields["error"] = status_of(reply.end.error).code or type(reply.end.error).__name__
    return fields


def _sentence(call: Call, fields: dict[str, Any]) -> str:
    parts = [f"{fields['method']} {call.route} {call.status} in {fields['duration_s']:.3f} s"]
    parts += [f"{name} {fields[name]}" for name in ("tenant", "agent", "outcome", "error") if name in fields]
    if "computed_tokens" in fields:
        sources = ("computed", "memory", "disk", "generated")
        parts.append("tokens " + " ".join(f"{fields[f'{name}_tokens']} {name}" for name in sources))
    return ", ".join(parts)
