"""What is said when no connection can be accepted."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
from typing import Any

log = logging.getLogger(__name__)

_EVERY_S = 10.0


class AcceptErrors:
    """An event loop's exception handler. Without a descriptor asyncio tries to accept as often as its backlog
    is long, each second, and would print a traceback each time: that alone keeps a server from serving."""

    def __init__(self) -> None:
        self._said_at = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Say it once in a while; all else is the loop's own business."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() >= self._said_at + _EVERY_S:
            self._said_at = loop.time()
            log.error("no descriptor is left for new connections; they wait. Raise the limit (ulimit -n)")
