"""What runs next. Counts, not phases: prefill, wake and decode are one path.

A waiting sequence is admitted when its pages fit: each block of its tokens is shared from the arena, read
from the store, or left to be computed. A step mixes all decoding sequences with a budget of prefill tokens.
Whose turn it is, `queue.py` says; one that does not fit is overtaken by small ones, but not for ever.
Under pressure idle pages go first (the pool sees to it), then a running sequence goes back to the queue; its
blocks stay findable.
"""

from __future__ import annotations

from itertools import islice

from dormouse.domain.blocks import BlockKey, Link, Tokens
from dormouse.domain.plan import Chunk, Plan
from dormouse.domain.requests import Priority
from dormouse.engine.drafts import MOST_DRAFTED, Drafter, draft_lengths
from dormouse.engine.loads import Load, Loads
from dormouse.engine.match import Match, Matcher
from dormouse.engine.pace import Pace
from dormouse.engine.pool import Pool
from dormouse.engine.queue import MOST_OVERTAKEN, Queue
from dormouse.engine.sequence import Sequence, State
from dormouse.engine.step import Copy, Step, Tail
from dormouse.store.block_store import BlockStore

_Planned = tuple[Sequence, Chunk, Tokens]
"""A sequence, its chunk, and the draft at the end of it."""

_ARENA_PER_AHEAD = 4


_LOOK_BEHIND = 4
"""So many requests are tried behind the first one that does not fit: each costs a walk along its blocks."""


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
        self.waiting = Queue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._block_size = block_size
        self._pace = Pace(token_budget)
        self._max_running = max_running
        self._loads = Loads(pool, store, load_timeout_s)
        self._matcher = Matcher(pool, store, self._loads)
        self._copies: list[Copy] = []
        self._preempted: list[Tail] = []
        self._admitted: list[Sequence] = []

    @property
    def sequences(self) -> list[Sequence]:
        """Every sequence that has not ended; loading ones are among the running."""
        return [*self.running, *self.waiting]

    @property
    def loads(self) -> Loads:
        """The reads in flight."""
        return self._loads

    @property
    def num_loading(self) -> int:
        """Blocks on their way from the store."""
        return len(self._loads)

    @property
    def num_overdue(self) -> int:
        """Blocks whose read was given up and has not returned."""
        return self._loads.num_overdue

    def next_deadline(self) -> float | None:
        """When a sequence or a load is to be given up, on the monotonic clock."""
        moments = [self._loads.next_deadline, *(s.deadline for s in self.sequences)]
        return min((moment for moment in moments if moment is not None), default=None)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.add(sequence)

    def schedule(self, now: float) -> Step:
        """Grow what runs, admit what fits beside it, and plan one step."""
        for sequence in self._loads.give_up(now):
            self._requeue(sequence)
        # Growth first: it may preempt, and what was just admitted has copies still to come.
        self._grow()
        self._admit(now)
        chunks = self._chunks()
        step = Step(
            tuple(self._admitted),
            tuple(self._preempted),
            tuple(self._copies),
            self._loads.take_new(),
            self._read_ahead(),
            Plan(tuple(chunk for _, chunk, _ in chunks)),
            tuple(sequence for sequence, _, _ in chunks),
            tuple(draft for _, _, draft in chunks),
        )
        self._admitted, self._preempted, self._copies = [], [], []
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
        """Admit in turn whoever fits, and read no further than the queue's bound on overtaking allows."""
        admitted: list[Sequence] = []
        while (sequence := self._next(admitted, now)) is not None:
            self.waiting.admit(sequence)
            sequence.overtaken = 0
            self.running.append(sequence)
            admitted.append(sequence)

    def _next(self, admitted: list[Sequence], now: float) -> Sequence | None:
        """The first one that fits, with its pages. Small ones may go before one that does not, but not for
        ever, and never a side request before a main one."""
        passed: list[Sequence] = []
        for sequence in list(islice(self.waiting, _LOOK_BEHIND + 1)):
            if sequence.gives_way and not all(waiting.gives_way for waiting in passed):
                break
            if self._fits(sequence, admitted, now):
                for waiting in passed:
                    waiting.overtaken += 1
                return sequence
            if sequence.overtaken >= MOST_OVERTAKEN:
                break
            passed.append(sequence)
        return None

    def _fits(self, sequence: Sequence, admitted: list[Sequence], now: float) -> bool:
        """Admit a sequence if it fits, for a main one by taking back what side requests hold."""
        missing = self._try_admit(sequence, now)
        # What was just admitted has copies and reads to come.
        sides = [s for s in self.running if s.gives_way and s.state is State.RUNNING and s not in admitted]
        if sequence.gives_way or missing > sum(len(side.pages) + 1 for side in sides):
            return not missing
        while missing and sides:
            self._preempt(sides.pop())
            missing = self._try_admit(sequence, now)
        return not missing

    def _try_admit(self, sequence: Sequence, now: float) -> int:
        """Give a sequence its pages; else what is missing: so many pages, or a place in the step."""
        if len(self.running) >= self._max_running:
            return 1
        match = self._matcher.match(sequence)
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
        missing = max(0, fresh + len(self.running) - self.pool.num_available)
        if missing:
            for page in reversed(found):
                self.pool.free(page)
        else:
            self._build_table(sequence, match, num_pages, now)
        return missing

    def _build_table(self, sequence: Sequence, match: Match, num_pages: int, now: float) -> None:
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
            sequence.admitted_at, sequence.woken_at = now, None if from_disk else now
            sequence.disk_tokens = from_disk
            sequence.memory_tokens = sequence.num_computed - from_disk
            self._admitted.append(sequence)

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
                wanted = self._matcher.to_load(sequence)[:room]
                sequence.num_ahead = len(wanted)
                keys += wanted
            room -= sequence.num_ahead
        return tuple(keys)

    # -- growth and pressure -------------------------------------------------------------------

    def _grow(self) -> None:
        """Give every running sequence pages for all its tokens, oldest first."""
        for sequence in list(self.running):
            while sequence.state is State.RUNNING and len(sequence.pages) < self._num_pages(sequence):
                if self.pool.num_available:
                    sequence.pages.append(self.pool.allocate())
                else:
                    self._preempt(self._victim())

    def _victim(self) -> Sequence:
        """Who makes room: a side request, else whoever did so least often, of these the youngest.

        The oldest stays for as long as there is another, so that somebody always gets to the end.
        """
        ready = [s for s in self.running if s.state is State.RUNNING]
        oldest = min(ready, key=lambda s: (s.gives_way, s.arrival))
        return max(ready, key=lambda s: (s.gives_way, s is not oldest, -s.num_preempted, s.arrival))

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        sequence.num_preempted += 1
        tail = self._requeue(sequence)
        if tail is not None:
            self._preempted.append(tail)
            sequence.left.append(tail.link.key)

    def _requeue(self, sequence: Sequence) -> Tail | None:
        """Back into the queue, to be matched anew."""
        self.running.remove(sequence)
        if sequence.state is State.LOADING and not sequence.num_generated:
            sequence.was_admitted = False  # it found less than it was counted for
        tail = self._drop_pages(sequence)
        sequence.num_computed = 0
        sequence.state = State.WAITING
        self.waiting.put_back(sequence)
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
            self.pool.free(page, warm=sequence.request.priority is Priority.MAIN)
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
        # Also where no token is due, the last row says whether the model still computes numbers.
        num_logits = len(draft) + 1
        return sequence, Chunk(tokens, start, tuple(pages), num_logits), draft

    def _num_pages(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self._block_size)
