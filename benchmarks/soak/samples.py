"""What the server takes and says of itself, every few seconds."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.resident import Resident
from benchmarks.soak.client import Client

_LIMIT_S = 30.0
_LEAVING_S = 10.0
"""A crowd's connections are closed some seconds after it: keep-alive."""
_SOURCES = ("computed", "memory", "disk", "generated")


@dataclass(frozen=True)
class Sample:
    """`at` is seconds into the run, `age` seconds since its server was ready. Memory is in MiB: `resident`
    counts the arena whole, of which the system hands out what was touched (`arena_touched`)."""

    at: float
    life: int
    age: float
    is_calm: bool
    resident: float
    anonymous: float
    file_backed: float
    arena_touched: float
    threads: int
    descriptors: int
    disk_walked: int
    disk_ledger: int
    disk_quota: int
    tokens: dict[str, int]
    running: int
    waiting: int
    preemptions: int
    evicted_blocks: int
    status: str
    reasons: list[str]
    others_percent: float

    def as_json(self) -> dict[str, Any]:
        """With figures as exact as they are."""
        return {
            key: round(value, 2) if isinstance(value, float) else value for key, value in vars(self).items()
        }


@dataclass
class Sampler:
    """Takes samples until cancelled. While no server runs there is nothing to sample but the disk."""

    client: Client
    data_dir: Path
    every_s: float
    samples: list[Sample] = field(default_factory=list)
    most_disk: int = 0
    _before: tuple[float, float, float, int] | None = None

    async def run(self) -> None:
        """Sample after sample."""
        while True:
            await self.take()
            await asyncio.sleep(self.every_s)

    async def take(self) -> None:
        """One sample; none, if the server ends meanwhile."""
        host = self.client.host
        began, pid = host.now, host.pid
        self.most_disk = max(self.most_disk, await asyncio.to_thread(walk, self.data_dir))
        if pid is None:
            return
        try:
            metrics = (await self.client.http.get(f"{host.url}/metrics", timeout=_LIMIT_S)).text
            health = (await self.client.http.get(f"{host.url}/health", timeout=_LIMIT_S)).json()
            sample = await asyncio.to_thread(self._sample, began, pid, metrics, health)
        except (httpx.TransportError, psutil.NoSuchProcess, OSError):
            if not host.was_down(began):
                raise
            return
        if not host.was_down(began):
            self.samples.append(sample)

    def _sample(self, began: float, pid: int, metrics: str, health: dict[str, Any]) -> Sample:
        host, client = self.client.host, self.client
        process = psutil.Process(pid)
        memory = Resident.of(pid)
        arena = health["memory"]["arena_nbytes"] / 2**20
        values = _values(metrics)
        engine = health["engine"]
        return Sample(
            at=began,
            life=len(host.lives),
            age=began - host.lives[-1].began,
            is_calm=client.num_crowds == 0 and client.last_crowd_end + _LEAVING_S < began,
            resident=memory.anonymous + memory.file_backed - memory.arena + arena,
            anonymous=memory.anonymous,
            file_backed=memory.file_backed,
            arena_touched=memory.arena,
            threads=process.num_threads(),
            descriptors=process.num_fds(),
            disk_walked=walk(self.data_dir),
            disk_ledger=sum(
                values[f"dormouse_store_bytes/{part}"] for part in ("blocks", "catalog", "quarantine")
            ),
            disk_quota=values["dormouse_store_quota_bytes"],
            tokens={source: values[f"dormouse_tokens_total/{source}"] for source in _SOURCES},
            running=engine["num_running"],
            waiting=engine["num_waiting"],
            preemptions=engine["preemptions"],
            evicted_blocks=values["dormouse_store_evicted_blocks_total"],
            status=health["status"],
            reasons=[reason["code"] for reason in health["reasons"]],
            others_percent=self._others(process),
        )

    def _others(self, server: psutil.Process) -> float:
        """What the machine's other processes took of its cores since the last sample, in percent."""
        times = psutil.cpu_times()
        whole, idle = sum(times), times.idle + getattr(times, "iowait", 0.0)
        ours = sum(server.cpu_times()[:2]) + sum(psutil.Process().cpu_times()[:2])
        now = (whole, idle, ours, server.pid)
        before, self._before = self._before, now
        if before is None or before[3] != server.pid or whole <= before[0]:
            return 0.0
        spent, idled, by_us = (after - then for after, then in zip(now[:3], before[:3], strict=True))
        return max(0.0, 100 * (spent - idled - by_us) / spent)


def walk(folder: Path) -> int:
    """Bytes of all files below a folder. A file that goes meanwhile does not count."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).stat().st_size
            except FileNotFoundError:
                continue
    return total


def _values(metrics: str) -> dict[str, int]:
    """By `name`, or `name/value` of the one label."""
    return {
        "/".join([sample.name, *sample.labels.values()]): int(sample.value)
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }
