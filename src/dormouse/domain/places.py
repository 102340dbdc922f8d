"""A bounded number of places, and who gets one when it becomes crowded."""

from __future__ import annotations

from collections import Counter


class Places:
    """Places that tenants take and give back. Not thread-safe.

    Up to `room` anybody gets one. Above it a tenant may hold as many as are left of another `room`: who
    floods is refused, who comes beside him is not, and a part is always left for the next one (Choudhury and
    Hahne's dynamic thresholds). So a single tenant has `room` places, and all together never more than twice
    as many.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._held: Counter[str] = Counter()
        self._taken = 0

    def __len__(self) -> int:
        """So many are taken."""
        return self._taken

    def take(self, tenant: str) -> bool:
        """One for `tenant`; False when there is none for this one."""
        if self._taken >= self.room and self._held[tenant] >= 2 * self.room - self._taken:
            return False
        self._taken += 1
        self._held[tenant] += 1
        return True

    def give_back(self, tenant: str) -> None:
        """One of `tenant`'s is free again."""
        assert self._held[tenant] > 0, f"{tenant!r} gives back a place that it does not hold"
        self._taken -= 1
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
