"""Remembered replies: the tokens that were generated, found again by what they look like as text.

All of them are in memory, so nobody waits for the disk; the catalog brings them back after a restart.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Lock

from dormouse.store.rows import ReplyId, ReplyRow

ENTRY_NBYTES = 256
"""What an entry takes beside its tokens, about."""


@dataclass(frozen=True, slots=True)
class ReplyBounds:
    """At most so many replies and bytes; none that was not used for `max_age_s` seconds."""

    max_count: int
    max_nbytes: int
    max_age_s: float


class Replies:
    """Thread-safe. The least recently used go first."""

    def __init__(
        self, bounds: ReplyBounds, now: float, stored: Iterable[tuple[ReplyId, ReplyRow]] = ()
    ) -> None:
        self._lock = Lock()
        self._bounds = bounds
        self._rows: OrderedDict[ReplyId, ReplyRow] = OrderedDict()
        self._nbytes = 0
        self._unsaved: dict[ReplyId, ReplyRow | None] = {}
        self._used: set[ReplyId] = set()
        # What the catalog has: of anything else it need not be told that it goes.
        self._stored: set[ReplyId] = set()
        for who, row in sorted(stored, key=lambda entry: entry[1].used_at):
            self._stored.add(who)
            self._enter(who, row)
        self._trim(now)

    @property
    def has_unsaved(self) -> bool:
        """Whether anything waits to be written; uses alone wait for the next writing."""
        return bool(self._unsaved)

    @property
    def unsaved_nbytes(self) -> int:
        """Bytes of the tokens that wait to be written."""
        with self._lock:
            return sum(len(row.tokens) for row in self._unsaved.values() if row is not None)

    def put(self, who: ReplyId, tokens: bytes, now: float) -> None:
        """Remember the packed `tokens`. One that alone is over the bound is not remembered."""
        with self._lock:
            if len(tokens) + ENTRY_NBYTES > self._bounds.max_nbytes:
                return
            row = ReplyRow(tokens, now)
            self._enter(who, row)
            self._unsaved[who] = row
            self._trim(now)

    def get(self, who: ReplyId, now: float) -> bytes | None:
        """The packed tokens. Counts as a use."""
        with self._lock:
            row = self._rows.get(who)
            if row is None:
                return None
            self._enter(who, ReplyRow(row.tokens, now))
            self._used.add(who)
            return row.tokens

    def unsaved(self) -> dict[ReplyId, ReplyRow | None]:
        """What is to be written: new and used replies, None for those that go."""
        with self._lock:
            used = {who: self._rows[who] for who in self._used if who in self._rows}
            return used | self._unsaved

    def apply(self, rows: Mapping[ReplyId, ReplyRow | None]) -> None:
        """These are committed."""
        with self._lock:
            for who, row in rows.items():
                if who in self._unsaved and self._unsaved[who] is row:
                    del self._unsaved[who]
                if self._rows.get(who) is row:
                    self._used.discard(who)
                if row is None:
                    self._stored.discard(who)
                    continue
                self._stored.add(who)
                if who not in self._rows:
                    self._unsaved[who] = None  # it went while it was written

    def check(self) -> None:
        """Raise AssertionError when the books do not balance."""
        with self._lock:
            assert self._nbytes == sum(map(_nbytes, self._rows.values()))
            assert self._nbytes <= self._bounds.max_nbytes

    def _enter(self, who: ReplyId, row: ReplyRow) -> None:
        before = self._rows.pop(who, None)
        self._rows[who] = row
        self._nbytes += _nbytes(row) - (_nbytes(before) if before is not None else 0)

    def _trim(self, now: float) -> None:
        bounds = self._bounds
        while self._rows:
            who, oldest = next(iter(self._rows.items()))
            too_many = len(self._rows) > bounds.max_count or self._nbytes > bounds.max_nbytes
            if not too_many and oldest.used_at > now - bounds.max_age_s:
                return
            del self._rows[who]
            self._nbytes -= _nbytes(oldest)
            self._used.discard(who)
            self._unsaved.pop(who, None)
            if who in self._stored:
                self._unsaved[who] = None


def _nbytes(row: ReplyRow) -> int:
    return len(row.tokens) + ENTRY_NBYTES
