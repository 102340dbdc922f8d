"""A sequence: one running generation, as counts. `num_computed` catches up with `num_tokens`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from dormouse.domain.blocks import ROOT, BlockKey, Link, Namespace, Tokens, block_key
from dormouse.domain.requests import Priority, Request, Timings, Usage
from dormouse.engine.detokenizer import Detokenizer
from dormouse.engine.drafts import Drafter
from dormouse.engine.sampler import Sampler


class State(Enum):
    """Where a sequence is. It waits for pages, for the disk, or for its turn in a step."""

    WAITING = auto()
    LOADING = auto()
    RUNNING = auto()
    DONE = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """The engine's side of a request. Owned by the engine thread.

    `tokens` is the prompt and what was sampled; the KV of the first `num_computed` of them is in `pages`.
    `max_length` bounds `len(tokens)`. `drafter` guesses what comes next, None where that is switched off.
    Times are of the monotonic clock, in seconds.
    """

    request: Request
    namespace: Namespace
    block_size: int
    tokens: list[int]
    max_length: int
    deadline: float
    sampler: Sampler
    detokenizer: Detokenizer
    drafter: Drafter | None = None
    state: State = State.WAITING
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    memory_tokens: int = 0
    disk_tokens: int = 0
    was_admitted: bool = False
    submitted_at: float = 0.0
    admitted_at: float | None = None
    woken_at: float | None = None
    """When the last block that it had to read was there."""
    answered_at: float | None = None
    """When the first token was there."""
    num_ahead: int | None = None
    """Blocks that were read ahead while it waited; None before anybody looked."""
    arrival: int = 0
    """Its number in the order of arrival."""
    overtaken: int = 0
    """How many that came after it were admitted since it was the first that did not fit."""
    num_preempted: int = 0
    reads: bool = True
    """Unset when a read that it waited for was given up or refused: it computes, whatever the store has."""
    left: list[BlockKey] = field(default_factory=list)
    """Its unfinished blocks of the times it was preempted; they may be stored."""
    stays: bool = False
    """Set on a side request that stands as a main one does: it was due, or made room often enough."""
    _chain: list[Link] = field(default_factory=list)

    @property
    def gives_way(self) -> bool:
        """Whether it makes room for others before they do."""
        return self.request.priority is Priority.SIDE and not self.stays

    @property
    def num_prompt(self) -> int:
        """Tokens that the request brought."""
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        """Tokens that were sampled so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens whose KV is still to be computed; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def num_sealed(self) -> int:
        """Full blocks whose KV is computed."""
        return self.num_computed // self.block_size

    @property
    def links(self) -> list[Link]:
        """The links of the sealed blocks."""
        return [self.link(index) for index in range(self.num_sealed)]

    def full_links(self) -> list[Link]:
        """The links of all full blocks of `tokens`, computed or not."""
        return [self.link(index) for index in range(len(self.tokens) // self.block_size)]

    def link(self, index: int) -> Link:
        """The link of full block `index`. Tokens are only ever appended, so it never changes."""
        while len(self._chain) <= index:
            start = len(self._chain) * self.block_size
            self._chain.append(self._link(start, start + self.block_size))
        return self._chain[index]

    def tail(self) -> Link | None:
        """The link of the unfinished block behind the sealed ones, if it holds any KV."""
        start = self.num_sealed * self.block_size
        return None if start == self.num_computed else self._link(start, self.num_computed)

    def usage(self) -> Usage:
        """Where the request's tokens came from."""
        return Usage(self.num_prompt, self.memory_tokens, self.disk_tokens, self.num_generated)

    def timings(self, now: float) -> Timings:
        """How long each phase took, for a reply that ends now."""
        admitted = self.admitted_at or now
        woken = self.woken_at or now
        answered = self.answered_at or now
        return Timings(
            queued_s=admitted - self.submitted_at,
            wake_s=woken - admitted,
            prefill_s=answered - woken,
            decode_s=now - answered,
        )

    def forced(self) -> Tokens:
        """Tokens that can only come next, by the reply's constraint: the best of guesses."""
        constraint = self.request.constraint
        return () if constraint is None else tuple(constraint.forced())

    def _link(self, start: int, end: int) -> Link:
        run = tuple(self.tokens[start:end])
        parent = self._chain[start // self.block_size - 1].key if start else ROOT
        return Link(block_key(self.namespace, parent, run), parent, run)
