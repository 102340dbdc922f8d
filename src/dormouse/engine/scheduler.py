"""What runs next. Counts, not phases: prefill, wake and decode are one path.

A waiting sequence is admitted when its pages fit: each block of its tokens is shared from the arena, read
from the store, or left to be computed. A step mixes all decoding sequences with a budget of prefill tokens.
Under pressure idle pages go first (the pool sees to it), then the youngest running sequence goes back to
the queue; its blocks stay findable.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from dormouse.domain.blocks import ROOT, BlockKey, Link, Namespace, Tokens, common_prefix
from dormouse.domain.plan import Chunk, Plan
from dormouse.engine.drafts import MOST_DRAFTED, Drafter, draft_lengths
from dormouse.engine.loads import Load, Loads
from dormouse.engine.pace import Pace
from dormouse.engine.pool import Pool
from dormouse.engine.sequence import Sequence, State
from dormouse.engine.step import Copy, Step, Tail
from dormouse.store.block_store import BlockStore

_Planned = tuple[Sequence, Chunk, Tokens]
"""A sequence, its chunk, and the draft at the end of it."""

_ARENA_PER_AHEAD = 4


@dataclass(slots=True)
class _Match:
    """What is known of a sequence's past: whole blocks, then the head of one more.

    `pages` has a page per whole block, None where the block is only in the store.
    """

    pages: list[int | None] = field(default_factory=list)
    head: Link | None = None
    head_page: int | None = None
    head_tokens: int = 0


class Scheduler:
    """Owned by the engine thread. `token_budget` bounds the prefill tokens of a step; beside streams that
    decode, `Pace` does."""

    def __init__(
        self,
        pool: Pool,
        store: BlockStore,
        block_size: int,
        *,
        token_budget: int,
        max_running: int,
        load_timeout_s: float,
    ) -> None:
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._store = store
        self._block_size = block_size
        self._pace = Pace(token_budget)
        self._max_running = max_running
        self._loads = Loads(pool, store, load_timeout_s)
        self._copies: list[Copy] = []
        self._preempted: list[Tail] = []

    @property
    def sequences(self) -> list[Sequence]:
        """Every sequence that has not ended; loading ones are among the running."""
        return [*self.running, *self.waiting]

    @property
    def num_loading(self) -> int:
        """Blocks on their way from the store."""
        return len(self._loads)

    def next_deadline(self) -> float | None:
        """When a sequence or a load is to be given up, on the monotonic clock."""
        moments = [self._loads.next_deadline, *(s.deadline for s in self.sequences)]
        return min((moment for moment in moments if moment is not None), default=None)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def schedule(self, now: float) -> Step:
        """Grow what runs, admit what fits beside it, and plan one step."""
        for sequence in self._loads.give_up(now):
            self._requeue(sequence)
        # Growth first: it may preempt, and what was just admitted has copies still to come.
        self._grow()
        self._admit(now)
        chunks = self._chunks()
        step = Step(
            tuple(self._preempted),
            tuple(self._copies),
            self._loads.take_new(),
            self._read_ahead(),
            Plan(tuple(chunk for _, chunk, _ in chunks)),
            tuple(sequence for sequence, _, _ in chunks),
            tuple(draft for _, _, draft in chunks),
        )
        self._preempted, self._copies = [], []
        return step

    def copied(self, copy: Copy) -> None:
        """A copy was carried out: its source may go."""
        self.pool.free(copy.source)

    def loaded(self, load: Load, *, ok: bool) -> None:
        """A read returned; if it failed, those who waited compute what is missing."""
        for sequence in self._loads.returned(load, ok=ok):
            self._requeue(sequence)

    def took(self, step: Step, seconds: float) -> None:
        """The step's computation took `seconds`."""
        chunks = zip(step.plan.chunks, step.drafts, strict=True)
        lengths = [len(chunk.tokens) - len(draft) for chunk, draft in chunks]
        prompt = sum(length for length in lengths if length > 1)
        self._pace.observe(lengths.count(1), prompt, seconds)

    def computed(self, sequence: Sequence, num_tokens: int) -> list[tuple[int, Link]]:
        """Count computed tokens; names, registers and returns the blocks that they filled."""
        before = sequence.num_sealed
        sequence.num_computed += num_tokens
        sealed = [(sequence.pages[i], sequence.link(i)) for i in range(before, sequence.num_sealed)]
        for page, link in sealed:
            self.pool.register(page, sequence.namespace, link)
        return sealed

    def release(self, sequence: Sequence) -> Tail | None:
        """Take a sequence out, for good or until it is added again.

        Its blocks stay findable while their pages last. Its unfinished tail is returned to be saved.
        """
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        tail = self._drop_pages(sequence)
        sequence.state = State.DONE
        return tail

    # -- admission -------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        while self.waiting and len(self.running) < self._max_running:
            if not self._try_admit(self.waiting[0], now):
                return
            self.running.append(self.waiting.popleft())

    def _try_admit(self, sequence: Sequence, now: float) -> bool:
        match = self._match(sequence)
        found = [page for page in (match.head_page, *match.pages) if page is not None]
        for page in found:
            self.pool.share(page)
        num_pages = self._num_pages(sequence)
        shared = sum(
            page is not None or self._loads.is_reading(sequence.link(index).key)
            for index, page in enumerate(match.pages)
        )
        fresh = num_pages - shared
        # Leave each of the others a page to grow by, or admission would only lead to preemption.
        if fresh + len(self.running) > self.pool.num_available:
            for page in reversed(found):
                self.pool.free(page)
            return False
        self._build_table(sequence, match, num_pages, now)
        return True

    def _build_table(self, sequence: Sequence, match: _Match, num_pages: int, now: float) -> None:
        """Pages that are shared, then pages to be read, then pages to be computed.

        The pages found by the match are referenced already; the head's until it was copied.
        """
        sequence.state = State.RUNNING
        sequence.num_computed = len(match.pages) * self._block_size + match.head_tokens
        from_disk = 0
        for index, found in enumerate(match.pages):
            if found is None:
                from_disk += self._block_size
                found = self._loads.read_block(sequence, sequence.link(index), now)
            sequence.pages.append(found)
        while len(sequence.pages) < num_pages:
            sequence.pages.append(self.pool.allocate())
        if match.head is not None:
            target = sequence.pages[len(match.pages)]
            if match.head_page is not None:
                self._copies.append(Copy(match.head_page, target, match.head_tokens))
            else:
                from_disk += match.head_tokens
                self._loads.read_head(sequence, match.head, target, now)
        if from_disk:
            sequence.state = State.LOADING
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.disk_tokens = from_disk
            sequence.memory_tokens = sequence.num_computed - from_disk

    def _read_ahead(self) -> tuple[BlockKey, ...]:
        """Blocks that those who wait will load, the first in the queue first; of each sequence once.

        Never more of them at a time than a part of the arena holds: the page cache is not ours alone.
        """
        room = self.pool.num_pages // _ARENA_PER_AHEAD
        keys: list[BlockKey] = []
        for sequence in self.waiting:
            if room <= 0:
                break
            if sequence.num_ahead is None:
                wanted = self._to_load(sequence)[:room]
                sequence.num_ahead = len(wanted)
                keys += wanted
            room -= sequence.num_ahead
        return tuple(keys)

    def _to_load(self, sequence: Sequence) -> list[BlockKey]:
        """Blocks of a waiting sequence that only the store has now."""
        match = self._match(sequence)
        keys = [sequence.link(index).key for index, page in enumerate(match.pages) if page is None]
        if match.head is not None and match.head_page is None:
            keys.append(match.head.key)
        return keys

    def _match(self, sequence: Sequence) -> _Match:
        """The longest known prefix, short of the last token, whose logits are still to be computed."""
        match = _Match()
        limit = len(sequence.tokens) - 1
        parent = ROOT
        for index in range(limit // self._block_size):
            key = sequence.link(index).key
            page = self.pool.find(key)
            if page is None and not self._loads.is_readable(key):
                break
            match.pages.append(page)
            parent = key
        start = len(match.pages) * self._block_size
        rest = sequence.tokens[start : min(limit, start + self._block_size)]
        if rest:
            self._match_head(match, sequence.namespace, parent, rest)
        return match

    def _match_head(self, match: _Match, namespace: Namespace, parent: BlockKey, rest: list[int]) -> None:
        """The block after `parent` with the longest head in common with `rest`; memory before disk."""
        found = self.pool.match_head(namespace, parent, rest)
        if found is not None:
            match.head_page, match.head, match.head_tokens = found
        for link in self._store.children(namespace, parent, rest[0]):
            length = common_prefix(link.tokens, rest)
            if length > match.head_tokens and self._loads.is_readable(link.key):
                match.head, match.head_page, match.head_tokens = link, None, length

    # -- growth and pressure -------------------------------------------------------------------

    def _grow(self) -> None:
        """Give every running sequence pages for all its tokens, oldest first."""
        for sequence in list(self.running):
            while sequence.state is State.RUNNING and len(sequence.pages) < self._num_pages(sequence):
                if self.pool.num_available:
                    sequence.pages.append(self.pool.allocate())
                else:
                    self._preempt(next(s for s in reversed(self.running) if s.state is State.RUNNING))

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        tail = self._requeue(sequence)
        if tail is not None:
            self._preempted.append(tail)

    def _requeue(self, sequence: Sequence) -> Tail | None:
        """Back to the head of the queue, to be matched anew."""
        self.running.remove(sequence)
        if sequence.state is State.LOADING and not sequence.num_generated:
            sequence.was_admitted = False  # it found less than it was counted for
        tail = self._drop_pages(sequence)
        sequence.num_computed = 0
        sequence.state = State.WAITING
        self.waiting.appendleft(sequence)
        return tail

    def _drop_pages(self, sequence: Sequence) -> Tail | None:
        """Give a sequence's pages back, tail first, after naming its unfinished block."""
        tail = None
        if sequence.state is State.LOADING:
            self._loads.forget(sequence)
            sequence.num_computed = 0
        elif (link := sequence.tail()) is not None:
            page = sequence.pages[sequence.num_sealed]
            self.pool.register(page, sequence.namespace, link)
            tail = Tail(sequence, page, link)
        for page in reversed(sequence.pages):
            self.pool.free(page)
        sequence.pages = []
        return tail

    # -- the plan ------------------------------------------------------------------------------

    def _chunks(self) -> list[_Planned]:
        """All decoding sequences, and the budget shared fairly among the prefilling ones."""
        ready = [s for s in self.running if s.state is State.RUNNING]
        decoding = [s for s in ready if s.num_remaining == 1]
        prefilling = sorted((s for s in ready if s.num_remaining > 1), key=lambda s: s.num_remaining)
        budget = whole = self._pace.budget(len(decoding))
        prefill = []
        for position, sequence in enumerate(prefilling):
            # The shortest come first and leave what they do not need to the others.
            share = max(1, budget // (len(prefilling) - position))
            num_tokens = min(sequence.num_remaining, share)
            if num_tokens <= budget:
                prefill.append(self._planned(sequence, num_tokens))
                budget -= num_tokens
        drafts = self._drafts(decoding, whole - budget)
        return [self._planned(s, 1, drafts.get(s, ())) for s in decoding] + prefill

    def _drafts(self, decoding: list[Sequence], num_prefill: int) -> dict[Sequence, Tokens]:
        """Guesses worth computing, on top of a step of these sequences and `num_prefill` prompt tokens."""
        guessing: list[tuple[Sequence, Drafter, Tokens]] = []
        for sequence in decoding:
            if sequence.drafter is not None:
                sequence.drafter.read(sequence.tokens, sequence.num_prompt)
                forced = sequence.forced()
                if forced or sequence.drafter.has_guess:
                    guessing.append((sequence, sequence.drafter, forced))
        chances = [1.0 if forced else drafter.chance for _, drafter, forced in guessing]
        rooms = [min(self._room(sequence), len(forced) or MOST_DRAFTED) for sequence, _, forced in guessing]
        lengths = draft_lengths(chances, rooms, len(decoding), num_prefill)
        return {
            sequence: forced[:length] or drafter.draft(sequence.tokens, length)
            for (sequence, drafter, forced), length in zip(guessing, lengths, strict=True)
            if length
        }

    def _room(self, sequence: Sequence) -> int:
        """Tokens that may be guessed: within the reply's bound, and within its pages.

        A page that will be needed soon is taken now, unless another sequence may need it to grow.
        """
        wanted = min(MOST_DRAFTED, sequence.max_length - len(sequence.tokens) - 1)
        room = len(sequence.pages) * self._block_size - len(sequence.tokens)
        if room < wanted and self.pool.num_available > len(self.running):
            sequence.pages.append(self.pool.allocate())
            room += self._block_size
        return min(room, wanted)

    def _planned(self, sequence: Sequence, num_tokens: int, draft: Tokens = ()) -> _Planned:
        """The next `num_tokens` of a sequence, and its draft behind them."""
        start = sequence.num_computed
        end = start + num_tokens
        tokens = (*sequence.tokens[start:end], *draft)
        pages = sequence.pages[: -(-(end + len(draft)) // self._block_size)]
        num_logits = len(draft) + 1 if end == len(sequence.tokens) else 0
        return sequence, Chunk(tokens, start, tuple(pages), num_logits), draft

    def _num_pages(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self._block_size)
