"""Log lines on standard error: for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from rich.logging import RichHandler

from dormouse.api.request_id import AddRequestId
from dormouse.cli.output import errors

CHATTY = ("httpx", "uvicorn", "opentelemetry")
"""A line a request from the libraries says nothing that our own lines do not."""


class JsonFormatter(logging.Formatter):
    """`time` (UTC), `level`, `logger`, `message`, `request_id` in a request, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        moment = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := getattr(record, "request_id", None)) is not None:
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}), ensure_ascii=False, default=str)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", None)
        return record.getMessage() + (f" [{request_id}]" if request_id else "")


def set_up_logging(level: str, log_format: str = "text") -> None:
    """Log to standard error from `level` on, as `text` or `json`."""
    handler: logging.Handler
    if log_format == "json":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter())
    else:
        handler = RichHandler(console=errors, show_path=False, rich_tracebacks=True)
        handler.setFormatter(_TextFormatter())
    handler.addFilter(AddRequestId())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
