"""The queue's rule: turns, priorities, and the bounds that it promises, under any order of arrival."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from tests.engine.waiting import waiting

from dormouse.domain.requests import Priority
from dormouse.engine.queue import MAINS_PER_SIDE, Queue
from dormouse.engine.sequence import Sequence


def drain(queue: Queue) -> list[str]:
    """Admit all, in turn; their ids."""
    order = []
    while len(queue):
        sequence = next(iter(queue))
        queue.admit(sequence)
        order.append(sequence.request.id)
    return order


def filled(*sequences: Sequence) -> Queue:
    queue = Queue()
    for sequence in sequences:
        queue.add(sequence)
    return queue


def test_agents_take_turns() -> None:
    queue = filled(*(waiting(f"a{i}", agent="a") for i in range(3)), waiting("b0", agent="b"))
    assert drain(queue) == ["a0", "b0", "a1", "a2"]


def test_tenants_take_turns_however_many_agents_they_name() -> None:
    flood = [waiting(f"f{i}", tenant="flood", agent=f"agent-{i}") for i in range(4)]
    queue = filled(*flood, waiting("x0", tenant="x", agent="a"), waiting("x1", tenant="x", agent="b"))
    assert drain(queue) == ["f0", "x0", "f1", "x1", "f2", "f3"]


def test_nameless_requests_of_a_tenant_have_one_turn() -> None:
    queue = filled(*(waiting(f"n{i}") for i in range(3)), waiting("named", agent="a"))
    assert drain(queue) == ["n0", "named", "n1", "n2"]


def test_an_agent_that_comes_again_stands_last() -> None:
    queue = filled(waiting("a0", agent="a"), waiting("b0", agent="b"), waiting("c0", agent="c"))
    queue.admit(next(iter(queue)))
    queue.add(waiting("a1", agent="a"))
    assert drain(queue) == ["b0", "c0", "a1"]


def test_side_requests_come_after_main_ones_but_not_after_all() -> None:
    sides = [waiting(f"s{i}", agent="a", priority=Priority.SIDE) for i in range(2)]
    mains = [waiting(f"m{i}", agent="b") for i in range(2 * MAINS_PER_SIDE)]
    order = drain(filled(*sides, *mains))
    assert [name for name in order if name[0] == "s"] == ["s0", "s1"]
    assert [order.index("s0"), order.index("s1")] == [MAINS_PER_SIDE, 2 * MAINS_PER_SIDE + 1]


def test_preempted_ones_come_first_the_oldest_of_them_before_the_others() -> None:
    queue = filled(*(waiting(f"r{i}", agent=f"a{i}") for i in range(4)))
    first, second, *_ = list(queue)
    for sequence in (first, second):
        queue.admit(sequence)
    for sequence in (second, first):
        queue.put_back(sequence)
    assert drain(queue) == ["r0", "r1", "r2", "r3"]


def test_who_goes_away_takes_no_turn() -> None:
    queue = filled(waiting("a0", agent="a"), waiting("a1", agent="a"), waiting("b0", agent="b"))
    queue.remove(next(iter(queue)))
    assert drain(queue) == ["a1", "b0"]


def test_a_side_request_inherits_no_turn_from_one_that_went_away() -> None:
    gone = waiting("gone", agent="a", priority=Priority.SIDE)
    queue = filled(gone, *(waiting(f"m{i}", agent="b") for i in range(MAINS_PER_SIDE + 1)))
    for _ in range(MAINS_PER_SIDE):
        queue.admit(next(iter(queue)))
    queue.remove(gone)
    queue.add(waiting("side", agent="a", priority=Priority.SIDE))
    assert drain(queue) == [f"m{MAINS_PER_SIDE}", "side"]


@dataclass
class Watched:
    """A waiting sequence, and what its bound is made of."""

    sequence: Sequence
    ahead: int
    """Of its own agent, when it came."""
    tenants: int = 1
    agents: int = 1
    passed: int = 0
    """Others of its priority that were admitted since it came."""


CLIENTS = st.tuples(st.sampled_from("xyz"), st.sampled_from(["a", "b", "c", None]), st.sampled_from(Priority))


@given(st.lists(st.one_of(CLIENTS, st.none()), max_size=120))
def test_nobody_waits_longer_than_the_formula_says(
    moves: list[tuple[str, str | None, Priority] | None],
) -> None:
    """A move is an arrival, or None: an admission."""
    queue = Queue()
    watched: list[Watched] = []

    def look() -> None:
        for one in watched:
            peers = {
                (w.sequence.request.tenant, w.sequence.request.agent)
                for w in watched
                if w.sequence.request.priority is one.sequence.request.priority
            }
            agents = Counter(tenant for tenant, _ in peers)
            one.tenants = max(one.tenants, len(agents))
            one.agents = max(one.agents, agents[one.sequence.request.tenant])

    def admit() -> None:
        sequence = next(iter(queue))
        queue.admit(sequence)
        (mine,) = (w for w in watched if w.sequence is sequence)
        assert mine.passed < (mine.ahead + 1) * mine.agents * mine.tenants
        watched.remove(mine)
        for other in watched:
            other.passed += other.sequence.request.priority is sequence.request.priority

    for number, move in enumerate(moves):
        if move is not None:
            tenant, agent, priority = move
            mine = [
                w
                for w in watched
                if (w.sequence.request.tenant, w.sequence.request.agent, w.sequence.request.priority) == move
            ]
            sequence = waiting(str(number), tenant=tenant, agent=agent, priority=priority)
            queue.add(sequence)
            watched.append(Watched(sequence, len(mine)))
            look()
        elif watched:
            admit()
        assert sorted(s.arrival for s in queue) == sorted(w.sequence.arrival for w in watched)
    while watched:
        admit()
    assert len(queue) == 0
    assert list(queue) == []


@given(st.lists(st.sampled_from(Priority), max_size=60))
def test_the_order_that_is_shown_is_the_order_of_admission(priorities: list[Priority]) -> None:
    """Up to the next side request that is due: the order shown does not count ahead."""
    queue = filled(*(waiting(str(i), agent=str(i % 3), priority=p) for i, p in enumerate(priorities)))
    for priority in Priority:
        shown = [s.request.id for s in queue if s.request.priority is priority]
        copy = filled(*(waiting(str(i), agent=str(i % 3), priority=p) for i, p in enumerate(priorities)))
        admitted = [name for name in drain(copy) if priorities[int(name)] is priority]
        assert admitted == shown


@given(st.lists(st.sampled_from([*Priority, None]), max_size=100))
def test_a_side_request_waits_for_a_bounded_number_of_main_ones(moves: list[Priority | None]) -> None:
    queue = Queue()
    mains_since_side = 0
    for number, move in enumerate(moves):
        if move is not None:
            queue.add(waiting(str(number), priority=move))
            continue
        if not len(queue):
            continue
        has_sides = any(s.request.priority is Priority.SIDE for s in queue)
        sequence = next(iter(queue))
        queue.admit(sequence)
        if not has_sides or sequence.request.priority is Priority.SIDE:
            mains_since_side = 0
        else:
            mains_since_side += 1
        assert mains_since_side <= MAINS_PER_SIDE
