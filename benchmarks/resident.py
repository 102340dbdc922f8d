"""What a server's resident memory is made of, as Linux accounts for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ARENA_FLAG = "hg"
"""Set on memory that asked for huge pages. Only the arena does."""


@dataclass(frozen=True, slots=True)
class Resident:
    """Sizes in MiB. `anonymous` is memory that only this process has, the arena's included; `file_backed` is
    of libraries and mapped files, which the system may drop and processes share."""

    anonymous: float
    file_backed: float
    arena: float

    @classmethod
    def of(cls, pid: int) -> Resident:
        """Of a process, from /proc."""
        anonymous = resident = arena = 0
        for sizes, flags in _mappings(Path(f"/proc/{pid}/smaps").read_text()):
            resident += sizes["Rss"]
            anonymous += sizes["Anonymous"]
            arena += sizes["Rss"] if ARENA_FLAG in flags else 0
        return cls(anonymous / 1024, (resident - anonymous) / 1024, arena / 1024)

    def beyond(self, weights: float) -> dict[str, float]:
        """What is left without `weights` (MiB, in anonymous memory) and the arena, rounded."""
        private = self.anonymous - self.arena - weights
        return {
            "resident_mib": round(self.anonymous + self.file_backed, 1),
            "weights_mib": round(weights, 1),
            "arena_mib": round(self.arena, 1),
            "beyond_anonymous_mib": round(private, 1),
            "beyond_file_backed_mib": round(self.file_backed, 1),
            "beyond_mib": round(private + self.file_backed, 1),
        }


def _mappings(smaps: str) -> Iterator[tuple[dict[str, int], list[str]]]:
    """Sizes in KiB and flags of each mapping; the flags are its last line."""
    sizes: dict[str, int] = {}
    for line in smaps.splitlines():
        name, _, value = line.partition(":")
        if name == "VmFlags":
            yield sizes, value.split()
            sizes = {}
        elif value.endswith(" kB"):
            sizes[name] = int(value.split()[0])
