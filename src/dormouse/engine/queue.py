"""Who waits, and whose turn it is. The rule, in three parts:

*Turns.* Tenants take turns, and the agents of a tenant take turns; an agent's own requests stay in order.
What a tenant asks without an agent's name counts as one agent's: to leave the name out must not pay. Who
comes new stands last. So a request with `p` of its own agent's before it waits for fewer than
`(p + 1) * A * T` others of its priority, where `T` tenants and at most `A` agents of each wait at one time,
however many requests these have.

*Priorities.* Side requests come after main ones, but one comes after every `MAINS_PER_SIDE` main ones that
were admitted while it waited; that one stays. Others make room for main ones, `MOST_YIELDS` times at most.

*Preempted ones* come first of their priority, the oldest first: they have had their turn already.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import chain

from dormouse.domain.requests import Priority
from dormouse.engine.sequence import Sequence

MAINS_PER_SIDE = 4
"""So many main requests are admitted for each side request, as long as both wait."""

MOST_YIELDS = 2

MOST_OVERTAKEN = 8
"""So often may a request that does not fit be overtaken by others that do; then all wait until it fits."""


class Queue:
    """The sequences that wait for their pages. Owned by the engine thread."""

    def __init__(self) -> None:
        self._turns = {priority: Turns() for priority in Priority}
        self._preempted: dict[Priority, list[Sequence]] = {priority: [] for priority in Priority}
        self._arrivals = 0
        self._mains_since_side = 0

    def __len__(self) -> int:
        return sum(len(turns) for turns in self._turns.values()) + sum(map(len, self._preempted.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """In turn: as they are admitted if all fit and nobody comes."""
        main, side = (self._in_turn(priority) for priority in Priority)
        if self._side_is_due:
            yield from (sequence for sequence in (next(side, None),) if sequence is not None)
        yield from chain(main, side)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self._turns[sequence.request.priority].add(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue one that was admitted before."""
        sequence.stays |= sequence.num_preempted >= MOST_YIELDS
        preempted = self._preempted[sequence.request.priority]
        preempted.append(sequence)
        preempted.sort(key=lambda waiting: waiting.arrival)

    def admit(self, sequence: Sequence) -> None:
        """It was this one's turn."""
        priority = sequence.request.priority
        if priority is Priority.SIDE:
            sequence.stays |= self._side_is_due
            self._mains_since_side = 0
        elif self._has_sides:
            self._mains_since_side += 1
        if sequence in self._preempted[priority]:
            self._preempted[priority].remove(sequence)
        else:
            self._turns[priority].take(sequence)
        self._forget_count()

    def remove(self, sequence: Sequence) -> None:
        """It waits no more, and had no turn."""
        priority = sequence.request.priority
        if sequence in self._preempted[priority]:
            self._preempted[priority].remove(sequence)
        else:
            self._turns[priority].remove(sequence)
        self._forget_count()

    def _forget_count(self) -> None:
        """What was counted for side requests that are gone is not owed to the next one."""
        if not self._has_sides:
            self._mains_since_side = 0

    @property
    def _side_is_due(self) -> bool:
        return self._mains_since_side >= MAINS_PER_SIDE

    @property
    def _has_sides(self) -> bool:
        return bool(self._preempted[Priority.SIDE]) or len(self._turns[Priority.SIDE]) > 0

    def _in_turn(self, priority: Priority) -> Iterator[Sequence]:
        return chain(self._preempted[priority], self._turns[priority])


class Turns:
    """Round robin over tenants, within a tenant over its agents, within an agent first come, first served."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, OrderedDict[str | None, deque[Sequence]]] = OrderedDict()
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Sequence]:
        """As they would be taken, if nobody came."""
        tenants = deque(deque(map(deque, agents.values())) for agents in self._tenants.values())
        while tenants:
            agents = tenants.popleft()
            line = agents.popleft()
            yield line.popleft()
            if line:
                agents.append(line)
            if agents:
                tenants.append(agents)

    def add(self, sequence: Sequence) -> None:
        """Last in its agent's line; an agent or a tenant that had none waiting comes last, too."""
        request = sequence.request
        agents = self._tenants.setdefault(request.tenant, OrderedDict())
        agents.setdefault(request.agent, deque()).append(sequence)
        self._len += 1

    def take(self, sequence: Sequence) -> None:
        """This one had its turn: its agent and its tenant go to the end."""
        request = sequence.request
        self.remove(sequence)
        if request.tenant in self._tenants:
            self._tenants.move_to_end(request.tenant)
            if request.agent in self._tenants[request.tenant]:
                self._tenants[request.tenant].move_to_end(request.agent)

    def remove(self, sequence: Sequence) -> None:
        """This one is gone; the turns are as they were."""
        request = sequence.request
        agents = self._tenants[request.tenant]
        agents[request.agent].remove(sequence)
        self._len -= 1
        if not agents[request.agent]:
            del agents[request.agent]
        if not agents:
            del self._tenants[request.tenant]
