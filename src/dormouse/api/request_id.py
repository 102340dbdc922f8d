"""The id of an HTTP request: the client's own where it sends a usable one."""

from __future__ import annotations

import logging
import re
import uuid
from contextvars import ContextVar

HEADER = "x-request-id"
ANTHROPIC_HEADER = "request-id"

_USABLE = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_current: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Only for log lines: whatever logs while a request is handled need not know of requests."""


def choose_request_id(sent: str | None) -> str:
    """`sent` if it can stand in a header and a log line as it is, else a new one."""
    return sent if sent is not None and _USABLE.fullmatch(sent) else f"req_{uuid.uuid4().hex}"


def set_current(id: str) -> None:
    """Log lines of this task, and of the threads it starts, belong to this request."""
    _current.set(id)


class AddRequestId(logging.Filter):
    """Gives every record a `request_id`; None outside of requests."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep all records."""
        record.request_id = _current.get()
        return True
