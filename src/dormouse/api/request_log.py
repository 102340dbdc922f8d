"""One log line per request that has ended. Never what was said, nor what a header held, but for its id."""

from __future__ import annotations

import logging
from typing import Any

from dormouse.api.call import Call
from dormouse.api.errors import status_of
from dormouse.domain.requests import Failed, Finished

log = logging.getLogger(__name__)

_QUIET_ROUTES = frozenset({"/health", "/health/live", "/health/ready", "/health/startup", "/metrics"})
"""Asked every few seconds by machines; their lines are for debugging."""


def log_call(call: Call) -> None:
    """Log an ended call: text for people, the same as `fields` for programs."""
    quiet = call.route in _QUIET_ROUTES and call.status < 400
    level = logging.DEBUG if quiet else logging.INFO
    if log.isEnabledFor(level):
        fields = fields_of(call)
        log.log(level, "%s", _sentence(call, fields), extra={"fields": fields})


def fields_of(call: Call) -> dict[str, Any]:
    """What is known of an ended call. Durations are in seconds; what does not apply is left out."""
    fields: dict[str, Any] = {
        "method": call.known_method,
        "route": call.route,
        "status": call.status,
        "dialect": call.dialect,
        "tenant": call.caller.tenant,
        "key": call.caller.key,
        "duration_s": round(call.ended_at - call.started_at, 6),
    }
    if call.request is not None:
        fields |= {
            "model": call.model,
            "agent": call.request.agent,
            "reply": call.request.id,
            "outcome": call.outcome,
            "prompt_tokens": len(call.request.prompt),
        }
    if call.pieces:
        fields["first_text_s"] = round(call.pieces[0] - call.started_at, 6)
    if isinstance(call.end, Finished):
        used, timings = call.end.usage, call.end.timings
        fields |= {
            "computed_tokens": used.prompt_tokens - used.cached_tokens,
            "memory_tokens": used.memory_tokens,
            "disk_tokens": used.disk_tokens,
            "generated_tokens": used.completion_tokens,
            "queued_s": round(timings.queued_s, 6),
            "wake_s": round(timings.wake_s, 6),
            "prefill_s": round(timings.prefill_s, 6),
            "decode_s": round(timings.decode_s, 6),
        }
    elif isinstance(call.end, Failed):
        # Its code, not its message: that may quote what was sent.
        fields["error"] = status_of(call.end.error).code or type(call.end.error).__name__
    return {name: value for name, value in fields.items() if value is not None}


def _sentence(call: Call, fields: dict[str, Any]) -> str:
    parts = [f"{fields['method']} {call.route} {call.status} in {fields['duration_s']:.3f} s"]
    parts += [f"{name} {fields[name]}" for name in ("tenant", "agent", "outcome", "error") if name in fields]
    if "computed_tokens" in fields:
        sources = ("computed", "memory", "disk", "generated")
        parts.append("tokens " + " ".join(f"{fields[f'{name}_tokens']} {name}" for name in sources))
    return ", ".join(parts)
