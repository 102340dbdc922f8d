"""What a server process holds under load, sampled from outside, and what it says of itself."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil
from benchmarks.server import Server
from prometheus_client.parser import text_string_to_metric_families
from tests.live import WAIT_S, wait_for

from dormouse.store.block_store import BlockStore

SAMPLE_S = 0.05
TEMP_SUFFIX = ".tmp"


@dataclass(frozen=True)
class Holdings:
    """Threads, open files (sockets are some of them), and resident memory in MiB."""

    threads: int
    files: int
    resident_mib: float

    @classmethod
    def of(cls, server: Server) -> Holdings:
        """Right now."""
        process = psutil.Process(server.pid)
        with process.oneshot():
            resident = process.memory_info().rss / 2**20
            return cls(process.num_threads(), process.num_fds(), round(resident, 1))

    def is_more_than(self, other: Holdings) -> bool:
        """In threads or in files."""
        return self.threads > other.threads or self.files > other.files


def settled(server: Server, before: Holdings) -> Holdings:
    """What the server holds, as soon as it has no more threads and files than `before`: it closes its
    sides of the connections in its own time. Raises TimeoutError."""
    end = time.monotonic() + WAIT_S
    while (now := Holdings.of(server)).is_more_than(before):
        if time.monotonic() > end:
            raise TimeoutError(f"after {WAIT_S:g} s there are {now}, and were {before}")
        time.sleep(SAMPLE_S)
    return now


def idle(client: httpx.Client) -> dict[str, Any]:
    """The engine's counts, as soon as nothing is left of any request, its pages included."""
    nothing = ("num_running", "num_waiting", "num_loading", "num_overdue", "pages_used")
    return wait_for(client, lambda engine: not any(engine[count] for count in nothing))


def state(client: httpx.Client) -> dict[str, Any]:
    """All that the server says of itself."""
    found: dict[str, Any] = client.get("/admin/state").raise_for_status().json()
    return found


def written(client: httpx.Client) -> dict[str, Any]:
    """What the store says, as soon as no block and no agent waits to be written. Raises TimeoutError."""
    end = time.monotonic() + WAIT_S
    while True:
        store: dict[str, Any] = state(client)["store"]
        waiting = store["num_pending"] + store["num_unsaved_agents"]
        if not waiting:
            return store
        if time.monotonic() > end:
            raise TimeoutError(f"after {WAIT_S:g} s {waiting} blocks and agents still wait")


def metrics(client: httpx.Client) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample of `/metrics`, by name and values of its labels."""
    text = client.get("/metrics").raise_for_status().text
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def chat_statuses(client: httpx.Client) -> Counter[int]:
    """How often chat completions were answered with which status."""
    text = client.get("/metrics").raise_for_status().text
    found: Counter[int] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            of_chat = sample.labels.get("route") == "/v1/chat/completions"
            if sample.name == "dormouse_requests_total" and of_chat:
                found[int(sample.labels["status"])] += int(sample.value)
    return found


def temp_files(data_dir: Path) -> list[Path]:
    """Files that a write has left behind."""
    return sorted(data_dir.rglob(f"*{TEMP_SUFFIX}"))


def assert_store_is_whole(data_dir: Path) -> None:
    """Derive every checksum, key and history again, after the server's end."""
    with BlockStore.open(data_dir, quota_nbytes=1 << 40) as store:
        store.check()
        report = store.verify()
    assert report.is_clean, report
    assert not temp_files(data_dir)


@dataclass(frozen=True)
class Sample:
    """What was held at a moment, and the bytes on disk against their bound."""

    held: Holdings
    disk_nbytes: int
    quota_nbytes: int


class Sampler:
    """Samples a server in a thread of its own for as long as the `with` lasts."""

    def __init__(self, server: Server) -> None:
        self.samples: list[Sample] = []
        self._server = server
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(WAIT_S)

    @property
    def most(self) -> Holdings:
        """The most of each that was seen."""
        held = [sample.held for sample in self.samples]
        return Holdings(
            max(one.threads for one in held),
            max(one.files for one in held),
            max(one.resident_mib for one in held),
        )

    def _run(self) -> None:
        with self._server.client() as client:
            while not self._done.wait(SAMPLE_S):
                store = state(client)["store"]
                self.samples.append(Sample(Holdings.of(self._server), store["nbytes"], store["quota_nbytes"]))
