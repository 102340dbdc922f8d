"""How often a key and an agent may ask: token buckets, a bounded number of them."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import StrEnum

from dormouse.api.caller import Caller
from dormouse.domain.errors import RateLimited

MAX_BUCKETS = 10_000
_PERIOD_S = 60.0


@dataclass(slots=True)
class _Bucket:
    level: float
    filled_at: float


class Buckets:
    """A bucket per name. It holds what a minute allows, all at once or bit by bit, and fills as time goes by.

    A bucket that was left alone for a minute is full, so that forgetting the longest unused one changes
    nothing; only with more than `MAX_BUCKETS` names a minute does a forgotten one start too full.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: OrderedDict[Hashable, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def wait_s(self, name: Hashable, amount: float) -> float:
        """Seconds until `amount` can be taken; 0 for now."""
        return max(0.0, (amount - self._bucket(name).level) * _PERIOD_S / self._per_minute)

    def take(self, name: Hashable, amount: float) -> None:
        """Take `amount`, be it more than there is: what is owed has to fill up first."""
        self._bucket(name).level -= amount

    def _bucket(self, name: Hashable) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(self._per_minute, now)
            if len(self._buckets) > MAX_BUCKETS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(name)
        gained = (now - bucket.filled_at) * self._per_minute / _PERIOD_S
        bucket.level = min(float(self._per_minute), bucket.level + gained)
        bucket.filled_at = now
        return bucket


class Limit(StrEnum):
    """What is limited, each per minute."""

    KEY_REQUESTS = "key_requests"
    KEY_TOKENS = "key_tokens"
    AGENT_REQUESTS = "agent_requests"


_REFUSALS = {
    Limit.KEY_REQUESTS: "this API key has sent its requests of this minute",
    Limit.KEY_TOKENS: "this API key has used its tokens of this minute",
    Limit.AGENT_REQUESTS: "this agent has sent its requests of this minute",
}


class RateLimits:
    """The limits of a server; None is no limit. Callers without a key share one bucket.

    For the event loop's thread. `refused` counts the requests that hit each limit.
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        agent_requests_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        per_minute = {
            Limit.KEY_REQUESTS: requests_per_minute,
            Limit.KEY_TOKENS: tokens_per_minute,
            Limit.AGENT_REQUESTS: agent_requests_per_minute,
        }
        self._buckets = {limit: Buckets(n, clock) for limit, n in per_minute.items() if n is not None}
        self.refused = dict.fromkeys(Limit, 0)

    def admit_request(self, caller: Caller) -> None:
        """Count a request of a key. Raises RateLimited."""
        # What a request will cost is not known before it ends: it may run if nothing is owed.
        self._check(Limit.KEY_TOKENS, caller.key)
        self._check(Limit.KEY_REQUESTS, caller.key)
        self._take(Limit.KEY_REQUESTS, caller.key, 1)

    def admit_agent(self, caller: Caller, agent: str | None) -> None:
        """Count a generation of an agent; the key alone limits those without. Raises RateLimited."""
        if agent is not None:
            self._check(Limit.AGENT_REQUESTS, (caller.tenant, agent))
            self._take(Limit.AGENT_REQUESTS, (caller.tenant, agent), 1)

    def spend_tokens(self, caller: Caller, num_tokens: int) -> None:
        """Charge a key for what its request took."""
        if num_tokens:
            self._take(Limit.KEY_TOKENS, caller.key, num_tokens)

    def _check(self, limit: Limit, name: Hashable) -> None:
        buckets = self._buckets.get(limit)
        seconds = 0 if buckets is None else math.ceil(buckets.wait_s(name, 1))
        if seconds:
            self.refused[limit] += 1
            message = f"{_REFUSALS[limit]}; try again in {seconds} s"
            raise RateLimited(message, retry_after_s=seconds)

    def _take(self, limit: Limit, name: Hashable, amount: int) -> None:
        if limit in self._buckets:
            self._buckets[limit].take(name, amount)
