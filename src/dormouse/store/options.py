"""What a store may use, and what it has."""

from __future__ import annotations

from dataclasses import dataclass

from dormouse.store.documents import DocumentBounds
from dormouse.store.opening import Bounds
from dormouse.store.replies import ReplyBounds
from dormouse.store.rows import CHECKPOINT_KIND

KEPT_KINDS = frozenset({"agent", "transcript", CHECKPOINT_KIND})
"""Documents that are never evicted: what an agent was made with, and what was said with it."""

MAX_BATCH_NBYTES = 64 << 20
"""Of payloads that are written at a time."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How a store uses memory, threads and time.

    `queue_nbytes` bounds the payloads that wait to be written. Uses of blocks are recorded every
    `touch_interval_s` and at close, failed writes tried again every `retry_s`; both in seconds.
    The bounds of documents are per tenant and kind; those of `kept_kinds` are refused above them, others
    push out the least recently used. Replies are forgotten `replies_age_s` seconds after their last use.
    """

    queue_nbytes: int = 256 << 20
    quarantine_nbytes: int = 256 << 20
    num_readers: int = 2
    touch_interval_s: float = 30.0
    retry_s: float = 1.0
    max_documents: int = 10_000
    max_documents_nbytes: int = 64 << 20
    kept_kinds: frozenset[str] = KEPT_KINDS
    max_replies: int = 20_000
    max_replies_nbytes: int = 32 << 20
    replies_age_s: float = 30 * 86400.0

    def bounds(self, quota_nbytes: int) -> Bounds:
        """These, and what follows from the disk quota.

        The documents of a tenant and kind take an eighth of it at most, those that are kept for good a
        quarter over all tenants, the replies of all an eighth.
        """
        share = quota_nbytes // 8
        return Bounds(
            quota_nbytes,
            self.queue_nbytes,
            min(MAX_BATCH_NBYTES, max(1, share)),
            self.retry_s,
            min(self.quarantine_nbytes, quota_nbytes // 10),
            DocumentBounds(
                self.max_documents, min(self.max_documents_nbytes, share), self.kept_kinds, quota_nbytes // 4
            ),
            ReplyBounds(self.max_replies, min(self.max_replies_nbytes, share), self.replies_age_s),
        )


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Sizes in bytes. `num_history_only` blocks are known by their tokens alone.

    `counts` are since the store was opened. `notes` say what start-up found and people should know.
    """

    num_blocks: int
    num_history_only: int
    num_agents: int
    num_unsaved_agents: int
    num_pending: int
    pending_nbytes: int
    nbytes: int
    blocks_nbytes: int
    catalog_nbytes: int
    quarantine_nbytes: int
    quota_nbytes: int
    encrypted: bool
    counts: dict[str, int]
    notes: tuple[str, ...]
