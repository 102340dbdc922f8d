"""What the engine thread does: one step after the other, three calls each.

`step = schedule()`, `logits = runtime.forward(step.plan)`, then the commit: count and seal what was
computed, sample, answer. Everything here runs on the engine thread, but for `stats` and `is_resident`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from dormouse.domain.blocks import BlockKey, Namespace, Tokens
from dormouse.domain.errors import (
    AgentNotFound,
    ConstraintBroken,
    DeadlineExceeded,
    DormouseError,
    ModelOutputInvalid,
    StepFailed,
    StoreError,
)
from dormouse.domain.model_spec import cache_namespace
from dormouse.domain.plan import Chunk
from dormouse.domain.requests import (
    Failed,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    Started,
    TextDelta,
)
from dormouse.engine.compute import compute
from dormouse.engine.detokenizer import Detokenizer, TokenDecoder
from dormouse.engine.drafts import Drafter
from dormouse.engine.loads import Load
from dormouse.engine.options import EngineOptions
from dormouse.engine.pool import Pool
from dormouse.engine.reply import Growth, grow
from dormouse.engine.residence import Residence
from dormouse.engine.sampler import Choices, Sampler, choose
from dormouse.engine.saver import Saver
from dormouse.engine.scheduler import Scheduler
from dormouse.engine.sequence import Sequence
from dormouse.engine.stats import EngineStats
from dormouse.engine.step import Step
from dormouse.runtimes.base import Logits, Runtime
from dormouse.store.block_store import BlockStore

log = logging.getLogger(__name__)

MOST_FAILED = 8
"""So many requests in a row that the runtime raises for, and it is taken for broken."""


class EngineLoop:
    """Owns sequences, pool and runtime. `post` brings a message back to the engine thread, `answer`
    ends a request."""

    def __init__(
        self,
        runtime: Runtime,
        store: BlockStore,
        new_decoder: Callable[[], TokenDecoder],
        eos_token_ids: frozenset[int],
        options: EngineOptions,
        *,
        post: Callable[[Callable[[], None]], None],
        answer: Callable[[Request, Finished | Failed], None],
    ) -> None:
        self._runtime = runtime
        self._store = store
        self._new_decoder = new_decoder
        # A folder may declare ids that its logits do not have.
        self._eos = frozenset(i for i in eos_token_ids if i < runtime.spec.vocab_size)
        self._options = options
        self._post = post
        self._answer = answer
        self._saver = Saver(runtime, store)
        self._pool = Pool(runtime.num_pages)
        self._scheduler = Scheduler(
            self._pool,
            store,
            runtime.cache.block_size,
            token_budget=options.token_budget,
            max_running=options.max_running,
            load_timeout_s=options.load_timeout_s,
        )
        self.residence = Residence(self._pool, self._scheduler.loads, runtime, store)
        self._sequences: dict[str, Sequence] = {}
        self._unsynced: dict[str, tuple[float, Request, Finished]] = {}
        self._namespaces: dict[str, Namespace] = {}
        self._counts: Counter[str] = Counter()
        self._failed_in_a_row = 0
        # numpy imports a part of itself on first use (20 ms): not on the first request's time.
        Sampler(SamplingParams(), (0,), self._eos)

    @property
    def max_length(self) -> int:
        """The longest sequence that can ever run, in tokens: by the model, and by the arena.

        One page is kept back, because the head of a shared block is copied beside its source.
        """
        by_arena = (self._runtime.num_pages - 1) * self._runtime.cache.block_size
        return min(self._runtime.spec.context_length, by_arena)

    @property
    def has_work(self) -> bool:
        """Whether any request is open."""
        return bool(self._sequences or self._unsynced)

    def next_deadline(self) -> float | None:
        """When something is due although no message comes, on the monotonic clock."""
        unsynced = (deadline for deadline, _, _ in self._unsynced.values())
        moments = [*unsynced, self._scheduler.next_deadline()]
        return min((moment for moment in moments if moment is not None), default=None)

    def is_resident(self, key: BlockKey) -> bool:
        """Whether the block is in the arena right now. For any thread."""
        return self._pool.find(key) is not None

    def stats(self) -> EngineStats:
        """Counts as of now, each read without a lock. For any thread."""
        scheduler, pool, counts = self._scheduler, self._pool, self._counts
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_loading=scheduler.num_loading,
            num_overdue=scheduler.num_overdue,
            pages_total=pool.num_pages,
            pages_used=pool.num_used,
            pages_idle=pool.num_idle,
            computed_tokens=counts["computed"],
            memory_tokens=counts["memory"],
            disk_tokens=counts["disk"],
            generated_tokens=counts["generated"],
            drafted_tokens=counts["drafted"],
            accepted_tokens=counts["accepted"],
            preemptions=scheduler.num_preemptions,
            failed_in_a_row=self._failed_in_a_row,
        )

    def check(self) -> None:
        """Raise AssertionError when pages or requests are not accounted for."""
        self._pool.check()
        held = Counter(page for s in self._scheduler.running for page in s.pages)
        assert self._pool.num_used >= len(held), "a sequence holds a page that the pool gave away"
        if not self.has_work and not self._scheduler.num_loading:
            assert self._pool.num_used == 0, f"{self._pool.num_used} pages are held by nobody"

    def add(self, request: Request, deadline: float) -> None:
        """Queue an accepted request. One that cannot be started is answered so; the others go on."""
        try:
            sequence = self._new_sequence(request, deadline)
        except Exception as error:
            log.exception("request %s could not be started", request.id)
            self._answer(request, Failed(DormouseError(f"the request could not be started: {error!r}")))
            return
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def _new_sequence(self, request: Request, deadline: float) -> Sequence:
        params = request.sampling
        return Sequence(
            request=request,
            namespace=self._namespace(request.tenant),
            block_size=self._runtime.cache.block_size,
            tokens=list(request.prompt),
            max_length=min(self.max_length, len(request.prompt) + params.max_tokens),
            deadline=deadline,
            sampler=Sampler(params, request.prompt, self._eos, request.constraint),
            detokenizer=Detokenizer(self._new_decoder(), params.stop),
            drafter=Drafter() if self._options.speculate else None,
            submitted_at=deadline - request.deadline_s,
        )

    def abort(self, request_id: str) -> Request | None:
        """Drop a request whose sender is gone; None when it has ended already."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        self._retire(sequence, None)
        return sequence.request

    def num_replies(self, tenant: str, agent: str) -> int:
        """Open requests of an agent."""
        return len(self._of_agent(tenant, agent))

    def abandon(self, tenant: str, agent: str) -> list[BlockKey] | None:
        """End the replies of an agent that is being deleted, and save nothing more of them.

        Their unfinished blocks are found no more. Returned are those that may be stored already; None when
        it gave no reply.
        """
        sequences = self._of_agent(tenant, agent)
        keys: list[BlockKey] = []
        for sequence in sequences:
            del self._sequences[sequence.request.id]
            # One that was preempted has computed nothing right now, but had.
            keys += [*(link.key for link in sequence.full_links()), *sequence.left]
            tail = self._scheduler.release(sequence)
            if tail is not None:
                self.residence.forget([tail.link.key])
            error = AgentNotFound(f"agent {agent!r} was deleted while it replied", param="agent")
            self._answer(sequence.request, Failed(error))
        return keys if sequences else None

    def _of_agent(self, tenant: str, agent: str) -> list[Sequence]:
        requests = self._sequences.values()
        return [s for s in requests if (s.request.tenant, s.request.agent) == (tenant, agent)]

    def step(self) -> bool:
        """One step; False when there was nothing to compute."""
        now = time.monotonic()
        self._expire(now)
        step = self._scheduler.schedule(now)
        for sequence in step.admitted:
            sequence.request.sink(Started(sequence.usage()))
        for tail in step.preempted:
            self._save(tail.sequence, partial(self._saver.save_tail, tail))
        for copy in step.copies:
            self._runtime.copy_page(copy.source, copy.target, copy.num_tokens)
            self._scheduler.copied(copy)
        for load in step.loads:
            buffer = self._runtime.page_buffer(load.page)
            try:
                self._store.load(load.link.key, buffer, partial(self._post_loaded, load))
            except StoreError as error:
                self._post_loaded(load, error)  # a message: it wakes whoever has nothing to compute
        if step.ahead:
            self._store.read_ahead(step.ahead)
        if not step.plan.chunks:
            return False
        for part in compute(self._runtime, step):
            if part.seconds is not None:
                self._scheduler.took(step, part.seconds)
            if part.logits is not None:
                self._commit(part.step, part.logits)
            elif part.error is not None:
                self._fail_step(part.step.sequences[0], part.error)
        return True

    def end(self, error: DormouseError, *, trust_pages: bool) -> int:
        """Answer everyone who still waits with `error`, after saving what they have; how many they were."""
        for request_id in list(self._unsynced):
            self._durable(request_id)
        num_cut = len(self._sequences)
        for sequence in list(self._sequences.values()):
            if trust_pages:
                try:
                    self._retire(sequence, None)
                except Exception:
                    log.exception("request %s could not be retired", sequence.request.id)
            self._answer(sequence.request, Failed(error))
        self._sequences.clear()
        return num_cut

    def _commit(self, step: Step, logits: Logits) -> None:
        """Sample for each sequence that is up to date and send what is new; then count and seal what was
        computed, and end what has ended."""
        planned = tuple(zip(step.sequences, step.plan.chunks, step.drafts, strict=True))
        is_due = [chunk.end - len(draft) == len(s.tokens) for s, chunk, draft in planned]
        wanted = zip(planned, is_due, strict=True)
        choices = choose(logits, [(s.sampler, draft) if due else None for (s, _, draft), due in wanted])
        growths: list[Growth] = []
        first = 0
        for (sequence, chunk, draft), due in zip(planned, is_due, strict=True):
            growth = (
                self._grow(sequence, draft, choices, first)
                if due
                else Growth(is_valid=choices.is_valid[first])
            )
            first += chunk.num_logits
            growths.append(growth)
            if growth.num_tokens and sequence.answered_at is None:
                sequence.answered_at = time.monotonic()
            if growth.text or growth.logprobs:
                sequence.request.sink(TextDelta(growth.text, growth.logprobs))
        for (sequence, chunk, draft), growth in zip(planned, growths, strict=True):
            self._settle(sequence, chunk, draft, growth)

    def _grow(self, sequence: Sequence, draft: Tokens, choices: Choices, first: int) -> Growth:
        try:
            return grow(sequence, draft, choices, first, self._eos)
        except Exception as error:
            # Its text cannot be made; that is nobody else's business.
            log.exception("the reply to request %s cannot go on", sequence.request.id)
            return Growth(error=DormouseError(f"the reply could not be decoded: {error!r}"))

    def _settle(self, sequence: Sequence, chunk: Chunk, draft: Tokens, growth: Growth) -> None:
        # The token of the last row that was used is not computed yet, be it the drafted one.
        num_accepted = max(0, growth.num_tokens - 1)
        self._counts["drafted"] += len(draft)
        self._counts["accepted"] += num_accepted
        self._counts["generated"] += growth.num_tokens
        if growth.is_valid or growth.num_tokens:
            num_computed = len(chunk.tokens) - len(draft) + num_accepted
            self._counts["computed"] += num_computed
            sealed = self._scheduler.computed(sequence, num_computed)
            self._save(sequence, partial(self._saver.save_blocks, sequence, sealed))
        if growth.error is not None:
            self._fail(sequence, growth.error)
        elif not growth.is_valid:
            self._fail(sequence, ModelOutputInvalid())
        elif growth.is_broken:
            self._fail(sequence, ConstraintBroken())
        elif growth.reason is not None:
            self._finish(sequence, growth.reason, growth.stop)

    def _fail_step(self, sequence: Sequence, error: Exception) -> None:
        """The runtime raises for this one. Raises `error` when it does so for everyone."""
        self._failed_in_a_row += 1
        self._fail(sequence, StepFailed(error))
        if self._failed_in_a_row >= MOST_FAILED:
            log.critical("%d requests in a row could not be computed", self._failed_in_a_row)
            raise error

    def _finish(self, sequence: Sequence, reason: FinishReason, stop: str | None = None) -> None:
        self._failed_in_a_row = 0
        generated = tuple(sequence.tokens[sequence.num_prompt :])
        timings = sequence.timings(time.monotonic())
        finished = Finished(reason, sequence.usage(), stop, generated, timings)
        request = sequence.request
        if self._retire(sequence, partial(self._post_durable, request.id)):
            deadline = time.monotonic() + self._options.sync_timeout_s
            self._unsynced[request.id] = (deadline, request, finished)
        else:
            self._answer(request, finished)

    def _fail(self, sequence: Sequence, error: DormouseError) -> None:
        self._retire(sequence, None)
        self._answer(sequence.request, Failed(error))

    def _retire(self, sequence: Sequence, on_durable: Callable[[bool], None] | None) -> bool:
        """Take a sequence out and save what it computed; True when `on_durable` will be called."""
        del self._sequences[sequence.request.id]
        self._counts["memory"] += sequence.memory_tokens
        self._counts["disk"] += sequence.disk_tokens
        pages = sequence.pages
        tail = self._scheduler.release(sequence)
        if not sequence.num_computed and not sequence.num_generated:
            return False
        waits = on_durable if self._options.sync else None
        return self._save(sequence, partial(self._saver.save_reply, sequence, pages, tail, waits)) is True

    def _save(self, sequence: Sequence, save: Callable[[], bool | None]) -> bool | None:
        """What `save` returns. A save that fails costs durability, never an answer."""
        try:
            return save()
        except Exception:
            log.exception("what request %s has computed could not be saved", sequence.request.id)
            return None

    def _expire(self, now: float) -> None:
        for sequence in self._scheduler.sequences:
            if sequence.deadline <= now:
                limit = sequence.request.deadline_s
                self._fail(sequence, DeadlineExceeded(f"no reply within {limit:g} s; it was cut"))
        for request_id, (deadline, _, _) in list(self._unsynced.items()):
            if deadline <= now:
                log.warning("request %s is answered but not on disk yet: the disk takes too long", request_id)
                self._durable(request_id)

    def _post_loaded(self, load: Load, error: Exception | None) -> None:
        """Called by a reader thread."""
        self._post(partial(self._loaded, load, error))

    def _loaded(self, load: Load, error: Exception | None) -> None:
        if error is None:
            try:
                self._runtime.page_loaded(load.page)
            except Exception as raised:
                log.exception("block %s was read in vain", load.link.key.hex())
                error = raised
        self._scheduler.loaded(load, ok=error is None)

    def _post_durable(self, request_id: str, ok: bool) -> None:
        """Called by the store's writer thread."""
        if not ok:
            log.warning("request %s is answered but not on disk yet", request_id)
        self._post(partial(self._durable, request_id))

    def _durable(self, request_id: str) -> None:
        if request_id in self._unsynced:
            _, request, finished = self._unsynced.pop(request_id)
            self._answer(request, finished)

    def _namespace(self, tenant: str) -> Namespace:
        if tenant not in self._namespaces:
            namespace = cache_namespace(self._runtime.spec, self._runtime.cache, tenant)
            spec = self._runtime.spec
            self._store.register(namespace, self._runtime.cache, spec.fingerprint, tenant=tenant)
            self._namespaces[tenant] = namespace
        return self._namespaces[tenant]
