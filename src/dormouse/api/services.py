"""What the routes of every dialect share."""

from __future__ import annotations

from dataclasses import dataclass, field

from dormouse.api.turns import Turns
from dormouse.models.decisions import Decisions
from dormouse.models.host import ModelHost
from dormouse.models.reply_memory import ReplyMemory
from dormouse.models.workers import Workers
from dormouse.store.block_store import BlockStore

PROMPT_TIMEOUT_S = 60.0
GRAMMAR_TIMEOUT_S = 10.0
_NUM_COMPILING = 2


@dataclass(frozen=True, slots=True)
class Services:
    """The models, the store, what is remembered about requests, and the threads that make prompts and
    grammars."""

    host: ModelHost
    store: BlockStore
    replies: ReplyMemory
    decisions: Decisions = field(default_factory=Decisions)
    turns: Turns = field(default_factory=Turns)
    prompts: Workers = field(default_factory=lambda: Workers("the prompt", PROMPT_TIMEOUT_S))
    grammars: Workers = field(
        default_factory=lambda: Workers("the grammar of the reply", GRAMMAR_TIMEOUT_S, _NUM_COMPILING)
    )
