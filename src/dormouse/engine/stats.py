"""What an engine says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for health and tools. Of the `drafted_tokens` that were guessed and computed,
    `accepted_tokens` were kept; `computed_tokens` has no others. `num_overdue` reads were given up.
    `failed_in_a_row` requests were the runtime's failures since the last reply that was complete."""

    num_running: int
    num_waiting: int
    num_loading: int
    num_overdue: int
    pages_total: int
    pages_used: int
    pages_idle: int
    computed_tokens: int
    memory_tokens: int
    disk_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int
    failed_in_a_row: int
