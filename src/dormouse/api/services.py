"""What the routes of every dialect share."""

from __future__ import annotations

from dataclasses import dataclass, field

from dormouse.models.decisions import Decisions
from dormouse.models.host import ModelHost
from dormouse.store.block_store import BlockStore


@dataclass(frozen=True, slots=True)
class Services:
    """The models, the store, and what is remembered about requests."""

    host: ModelHost
    store: BlockStore
    decisions: Decisions = field(default_factory=Decisions)
