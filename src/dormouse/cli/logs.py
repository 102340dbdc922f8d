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


class _TextHandler(RichHandler):
    """For a pretty traceback Python opens files, and none may be left to open: then it is a plain one. An
    error that cannot be logged would end the event loop."""

    def __init__(self) -> None:
        super().__init__(console=errors, show_path=False, rich_tracebacks=True)
        self._plain = logging.StreamHandler(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        try:
            super().emit(record)
        except (OSError, ImportError):
            self._plain.emit(record)


def set_up_logging(level: str, log_format: str = "text") -> None:
    """Log to standard error from `level` on, as `text` or `json`."""
    handler: logging.Handler
    if log_format == "json":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter())
    else:
        handler = _TextHandler()
        handler.setFormatter(_TextFormatter())
    handler.addFilter(AddRequestId())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
