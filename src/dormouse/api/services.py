"""What the routes of every dialect share."""

from __future__ import annotations

from dataclasses import dataclass, field

from dormouse.models.decisions import Decisions
from dormouse.models.host import ModelHost
from dormouse.models.reply_memory import ReplyMemory
from dormouse.models.workers import Workers
from dormouse.store.block_store import BlockStore


@dataclass(frozen=True, slots=True)
class Services:
    """The models, the store, what is remembered about requests, and the threads that make prompts."""

    host: ModelHost
    store: BlockStore
    replies: ReplyMemory
    decisions: Decisions = field(default_factory=Decisions)
    workers: Workers = field(default_factory=Workers)
