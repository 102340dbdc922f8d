"""What the scheduler asks of the engine: one step, in the order in which it is carried out."""

from __future__ import annotations

from dataclasses import dataclass

from dormouse.domain.blocks import BlockKey, Link, Tokens
from dormouse.domain.plan import Plan
from dormouse.engine.loads import Load
from dormouse.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the first `num_tokens` rows of `source` (referenced until done) to `target`."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Tail:
    """An unfinished block and its page, whose content is good until the step is carried out."""

    sequence: Sequence
    page: int
    link: Link


@dataclass(frozen=True, slots=True)
class Step:
    """What the engine carries out, in this order: tell those who were `admitted` for the first time, save
    the preempted tails, copy, start the loads (nobody awaits them here), read `ahead` for those who wait,
    compute the plan.

    `sequences` and `drafts` are those of the plan's chunks; a chunk ends with its draft.
    """

    admitted: tuple[Sequence, ...]
    preempted: tuple[Tail, ...]
    copies: tuple[Copy, ...]
    loads: tuple[Load, ...]
    ahead: tuple[BlockKey, ...]
    plan: Plan
    sequences: tuple[Sequence, ...]
    drafts: tuple[Tokens, ...]
