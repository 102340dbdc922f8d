"""Why the store does not do all of its work, for machines and for people."""

from __future__ import annotations

import errno
import logging
import sqlite3
from dataclasses import dataclass

from dormouse.domain.errors import DamagedCatalog, StoreError

log = logging.getLogger(__name__)

FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
DESCRIPTOR_ERRNOS = (errno.EMFILE, errno.ENFILE)
READ_ONLY_ERRNOS = (errno.EROFS, errno.EACCES, errno.EPERM)

WriteError = StoreError | OSError | sqlite3.Error
WRITE_ERRORS = (StoreError, OSError, sqlite3.Error)
"""What a disk can do to a write; anything else is an error of ours."""


@dataclass(frozen=True, slots=True)
class HealthReason:
    """One reason: `code` is stable, `text` says what to do."""

    code: str
    text: str


class Health:
    """Current reasons by the part that fails. Reported by the writer thread, read by anyone."""

    def __init__(self) -> None:
        self._reasons: dict[str, HealthReason] = {}

    @property
    def reasons(self) -> tuple[HealthReason, ...]:
        """Empty when all is well."""
        return tuple(self._reasons.copy().values())

    def failed(self, part: str, error: Exception) -> None:
        """`part` cannot write because of `error`. Logged when that is news."""
        reason = HealthReason(_code(error), f"{part}: {error}; {_advice(_code(error))}")
        before = self._reasons.get(part)
        self._reasons[part] = reason
        if before is None or before.code != reason.code:
            log.error("degraded: %s", reason.text)

    def stopped(self, error: Exception) -> None:
        """The writer ended by an error of ours."""
        text = f"the store's writer stopped: {error!r}; nothing is saved any more, restart the server"
        self._reasons["writer"] = HealthReason("writer_stopped", text)

    def works(self, part: str) -> None:
        """`part` has just written something."""
        if part in self._reasons:
            del self._reasons[part]
            log.info("%s can be written again", part)


def _code(error: Exception) -> str:
    if isinstance(error, StoreError) and not isinstance(error, DamagedCatalog):
        return "quota_too_small"
    if isinstance(error, sqlite3.Error):
        primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
        codes = {sqlite3.SQLITE_FULL: "disk_full", sqlite3.SQLITE_READONLY: "store_read_only"}
        return codes.get(primary, "write_failed")
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL_ERRNOS:
        return "disk_full"
    if number in DESCRIPTOR_ERRNOS:
        return "descriptors_exhausted"
    return "store_read_only" if number in READ_ONLY_ERRNOS else "write_failed"


def _advice(code: str) -> str:
    what = {
        "disk_full": "free disk space",
        "store_read_only": "make the data folder writable",
        "quota_too_small": "raise the disk quota",
        "descriptors_exhausted": "raise the limit on open files (ulimit -n)",
        "write_failed": "check the disk",
    }[code]
    return f"serving goes on from memory; {what}, saving resumes by itself"
