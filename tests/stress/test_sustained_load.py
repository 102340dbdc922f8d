"""Agents that talk on and on, more of them than memory, queue and disk hold: nothing grows, nothing fails,
the disk keeps its bound, and late rounds are as early ones were."""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.figures import Scale
from benchmarks.flood import TOO_MANY, Client, Visit, percentiles, visit_all
from tests.live import strict_server
from tests.stress.watch import (
    Holdings,
    Sample,
    Sampler,
    assert_store_is_whole,
    chat_statuses,
    idle,
    state,
    temp_files,
    written,
)

from dormouse.models.folder import ModelFolder

pytestmark = pytest.mark.timeout(1200)

FLAGS = (
    *("--arena-tokens", "2048", "--max-running", "4", "--max-queue", "1"),
    *("--disk-quota-gb", "0.025", "--block-size", "64"),
)
"""For a part of the agents each: pages, places in the queue, and disk."""
GROWTH = 1.05
TURNS = 4
"""A conversation has so many turns; then the agent begins a new one."""
REPLY = 12
FEWEST_SAMPLES = 20


@dataclass(frozen=True)
class Round:
    """A turn of every agent, what the server held when it was idle again, and temp files that lay there."""

    visits: list[Visit]
    held: Holdings
    num_temps: int
    cached_tokens: int

    @property
    def first_token_s(self) -> dict[str, float]:
        """Percentiles."""
        return percentiles([seen.first_token_s for seen in self.visits if seen.first_token_s])


@dataclass(frozen=True)
class Load:
    """The whole run: rounds, what was sampled meanwhile, and what the server said at its end."""

    rounds: list[Round]
    samples: list[Sample]
    store: dict[str, Any]
    statuses: Counter[int]
    data: Path

    def thirds(self) -> tuple[list[Round], list[Round], list[Round]]:
        """Warming up, early, late."""
        size = len(self.rounds) // 3
        return self.rounds[:size], self.rounds[size : 2 * size], self.rounds[2 * size :]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, smollm2: ModelFolder, scale: Scale) -> Load:
    data = tmp_path_factory.mktemp("sustained") / "data"
    num_agents, num_rounds = 8, scale(8, 60)
    with (
        # Development mode keeps more of what is allocated: growth is measured without it.
        strict_server(data, "--model", str(smollm2.path), *FLAGS, dev_mode=False) as server,
        server.client() as http,
        Sampler(server) as sampler,
    ):
        pasts: list[tuple[dict[str, str], ...]] = [()] * num_agents
        rounds: list[Round] = []
        for number in range(num_rounds):
            clients = [_turn(agent, number, past) for agent, past in enumerate(pasts)]
            before = _found(http)
            visits = asyncio.run(visit_all(server.url, clients, num_agents))
            pasts = [
                (*client.messages, {"role": "assistant", "content": seen.text})
                for client, seen in zip(clients, visits, strict=True)
            ]
            idle(http)
            written(http)
            rounds.append(Round(visits, Holdings.of(server), len(temp_files(data)), _found(http) - before))
        store, statuses = state(http)["store"], chat_statuses(http)
    return Load(rounds, sampler.samples, store, statuses, data)


def _turn(agent: int, number: int, past: tuple[dict[str, str], ...]) -> Client:
    """The agent's next turn: a document to read at first, and questions about it."""
    if number % TURNS == 0:
        years = range(1700, 1718)
        lines = [f"In {year} agent {agent} counted {(number + agent) * year % 97} carts." for year in years]
        past, text = (), f"{' '.join(lines)} How many carts came in 1705?"
    else:
        text = f"And in {1705 + number % TURNS}? Say it in a sentence."
    return Client(f"agent-{agent}", (*past, {"role": "user", "content": text}), REPLY)


def _found(http: httpx.Client) -> int:
    engine = state(http)["engine"]
    return int(engine["memory_tokens"] + engine["disk_tokens"])


def test_memory_threads_and_files_do_not_grow(load: Load, figures: dict[str, Any]) -> None:
    """S25, S26: after the first third, in which the arena is touched, memory grows by less than 5%; threads
    and open files are what they were, and no temp file stays."""
    _, early, late = load.thirds()
    memory = [statistics.median(one.held.resident_mib for one in third) for third in (early, late)]
    figures |= {
        "requests": sum(len(one.visits) for one in load.rounds),
        "resident_mib": [one.held.resident_mib for one in load.rounds],
        "growth_percent": round(100 * (memory[1] / memory[0] - 1), 2),
        "threads": [early[0].held.threads, late[-1].held.threads],
        "files": [early[0].held.files, late[-1].held.files],
    }
    assert memory[1] < GROWTH * memory[0]
    # A look at the disk has a thread for a moment; a connection that was just closed may still be counted.
    assert min(one.held.threads for one in late) <= max(one.held.threads for one in early)
    assert min(one.held.files for one in late) <= max(one.held.files for one in early)
    assert not any(one.num_temps for one in load.rounds)


def test_late_rounds_find_their_past_as_early_ones_do(load: Load, figures: dict[str, Any]) -> None:
    """S25, S27: the latencies of all rounds are recorded; what later turns find does not fade."""
    whole = len(load.rounds) // TURNS * TURNS
    cycles = [load.rounds[start : start + TURNS] for start in range(0, whole, TURNS)]
    first, last = cycles[0], cycles[-1]
    figures |= {
        "first_token_s": {
            "early": [one.first_token_s for one in first],
            "late": [one.first_token_s for one in last],
        },
        "total_s": percentiles([v.total_s for one in load.rounds for v in one.visits if v.total_s]),
        "found_tokens": {
            "early": [one.cached_tokens for one in first],
            "late": [one.cached_tokens for one in last],
        },
    }
    later_turns = [one for cycle in cycles for one in cycle[1:]]
    assert all(one.cached_tokens > 0 for one in later_turns), "a round found nothing of its past"


def test_the_disk_quota_holds_at_every_sample(load: Load, figures: dict[str, Any]) -> None:
    """S25: more was written than the disk may hold, and it never held more. What remains is whole."""
    quota = load.store["quota_nbytes"]
    most = max(sample.disk_nbytes for sample in load.samples)
    figures |= {
        "samples": len(load.samples),
        "quota_mb": quota / 1e6,
        "most_mb": round(most / 1e6, 2),
        "written_mb": round(load.store["counts"]["bytes_written"] / 1e6, 2),
        "evicted_blocks": load.store["counts"]["evictions"],
    }
    assert len(load.samples) > FEWEST_SAMPLES
    assert load.store["counts"]["evictions"] > 0, "the disk was never full"
    assert most <= quota
    assert_store_is_whole(load.data)
    assert sum(file.stat().st_size for file in load.data.rglob("*") if file.is_file()) <= quota


def test_there_are_no_errors_but_the_intended_429s(load: Load, figures: dict[str, Any]) -> None:
    """S25: every refusal that the server counted was told to a client, and every client got its reply."""
    visits = [seen for one in load.rounds for seen in one.visits]
    refusals = sum(seen.refused for seen in visits)
    figures |= {"statuses": {str(status): count for status, count in load.statuses.items()}}
    assert all(seen.is_whole for seen in visits)
    assert refusals > 0, "the queue was never full"
    assert load.statuses == {200: len(visits), TOO_MANY: refusals}
    assert load.store["num_unsaved_agents"] == 0
    assert load.store["counts"]["failed_writes"] == 0
