"""Why an agent was or was not found where it was: the last decision of the cache, kept for who asks."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from dormouse.domain.blocks import common_prefix
from dormouse.domain.requests import Usage

_MOST_AGENTS = 4096
_NUM_SHOWN = 48
"""Tokens shown of each side where a prompt leaves an agent's history."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a prompt left the agent's history: after `at` tokens; what the history goes on with, and what
    came instead."""

    at: int
    remembered: tuple[int, ...]
    received: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What a request of an agent found. Times in seconds, `at` of the Unix clock; `wait_s` is from the
    request to its first token."""

    at: float
    model: str
    history_tokens: int
    usage: Usage
    wait_s: float
    divergence: Divergence | None

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were not found."""
        return self.usage.prompt_tokens - self.usage.cached_tokens


class Decisions:
    """The last decision of each agent, by tenant and name; the agents asked last are kept. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: OrderedDict[tuple[str, str], Decision] = OrderedDict()

    def note(self, tenant: str, agent: str, decision: Decision) -> None:
        """Remember an agent's newest decision."""
        with self._lock:
            self._last[tenant, agent] = decision
            self._last.move_to_end((tenant, agent))
            if len(self._last) > _MOST_AGENTS:
                self._last.popitem(last=False)

    def last(self, tenant: str, agent: str) -> Decision | None:
        """The newest decision of an agent, None when it made no request since the start."""
        with self._lock:
            return self._last.get((tenant, agent))

    def forget(self, tenant: str, agent: str) -> None:
        """The agent is deleted, and so are the words that its decision shows."""
        with self._lock:
            self._last.pop((tenant, agent), None)


def divergence(history: Sequence[int], prompt: Sequence[int]) -> Divergence | None:
    """Where `prompt` leaves `history`; None when it goes on where the history ends."""
    at = common_prefix(tuple(history), tuple(prompt))
    if at == len(history):
        return None
    shown = slice(at, at + _NUM_SHOWN)
    return Divergence(at, tuple(history[shown]), tuple(prompt[shown]))


def decided(
    model: str, history: Sequence[int], usage: Usage, wait_s: float, where: Divergence | None
) -> Decision:
    """The decision of a request that has just got its first token."""
    return Decision(time.time(), model, len(history), usage, wait_s, where)
