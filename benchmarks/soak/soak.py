"""One soak from its first server to its document, which is written however the run ends."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.soak import figures
from benchmarks.soak.agents import Agent
from benchmarks.soak.client import Client
from benchmarks.soak.host import Host
from benchmarks.soak.mix import Mix, What
from benchmarks.soak.moments import Moments
from benchmarks.soak.promises import verdicts
from benchmarks.soak.samples import Sampler
from benchmarks.soak.twins import Twins, choose
from benchmarks.soak.world import World
from dormouse.bench.machine import describe

_SETTLE_S = 60.0
_OVERTIME_S = 600.0
"""A restart or a crowd that the run's end falls into is seen through, for so long at most."""
_TWIN_ARENA = 32768
_LOUD = ("error", "critical")
_COMPLAINTS = ("Traceback", "Warning:", "never retrieved", "was destroyed")


@dataclass
class Soak:
    """The run's parts. `out` gets the raw records as lines, `folder` is for the servers' data."""

    mix: Mix
    seed: int
    seconds: float
    folder: Path
    out: Path
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    _end: dict[str, Any] = field(default_factory=dict)
    _failure: str = ""

    def __post_init__(self) -> None:
        flags = [*self.mix.server.flags, "--log-format", "json"]
        self.host = Host(self.folder / "data", flags, self.out / "server.log")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self.http = httpx.AsyncClient(limits=limits, timeout=None)
        self.client = Client(self.host, self.http)
        self.world = World(self.client, self.mix, self.seed, self.seconds)
        self.moments = Moments(self.world, [])
        self.sampler = Sampler(self.client, self.host.data_dir, self.mix.run.sample_s)
        self.twins = Twins()

    async def run(self) -> dict[str, Any]:
        """The document of the run. A failure of the harness itself is in it, too."""
        started = describe()
        try:
            async with self.http:
                await self._load()
                await self._finish()
        except Exception:  # noqa: BLE001  it is in the document, and makes the run fail
            self._failure = traceback.format_exc()
        finally:
            self.host.close()
        return self._document(started)

    async def _load(self) -> None:
        """All agents and moments for as long as planned and until those are over, or until told to stop."""
        await self.host.start()
        agents = [Agent(self.world, kind, number) for kind in self.mix.kinds for number in range(kind.agents)]
        moments = asyncio.create_task(self.moments.run())
        works = [*(agent.live() for agent in agents), self.sampler.run()]
        tasks: set[asyncio.Task[Any]] = {moments, *(asyncio.create_task(work) for work in works)}
        stopping = asyncio.create_task(self.stop.wait())
        try:
            while not stopping.done():
                end = self.seconds + (0.0 if moments.done() else _OVERTIME_S)
                if self.host.now >= end:
                    break
                done, _ = await asyncio.wait(
                    [stopping, *tasks], timeout=end - self.host.now, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done - {stopping}:
                    task.result()  # an agent that ends has failed, and its failure is raised here
                tasks -= done
        finally:
            await _cancel([*tasks, stopping])

    async def _finish(self) -> None:
        """What can only be seen when the load is over."""
        self._end["seconds"] = round(self.host.now, 1)
        if self.stop.is_set():
            return  # who stops the run may have stopped the server, too
        await self.host.until_up()
        await self._settle()
        await self.sampler.take()
        await self.host.end(What.SIGTERM)
        self._end["verify"] = await asyncio.to_thread(_verify, self.host.data_dir)
        await self._compare()
        self._end["complaints"] = _complaints(self.host.log)

    async def _settle(self) -> None:
        """Have the engine end what the agents left, and note what stays."""
        async with asyncio.timeout(_SETTLE_S):
            while True:
                engine = (await self.http.get(f"{self.host.url}/health")).json()["engine"]
                left = {
                    "running": engine["num_running"],
                    "waiting": engine["num_waiting"],
                    "pages_used": engine["pages_used"],
                }
                self._end |= left
                if not any(left.values()):
                    return
                await asyncio.sleep(0.2)

    async def _compare(self) -> None:
        """Twins, at a server of their own with an empty store and room for all of them."""
        flags = ["--arena-tokens", str(_TWIN_ARENA)]
        host = Host(self.folder / "twins", flags, self.out / "twins.log")
        await host.start()
        try:
            client = Client(host, self.http)
            chosen = choose(self.world.sessions, self.mix.run.twins)
            await self.twins.compare(client, chosen)
        finally:
            await host.end(What.SIGTERM)

    def _document(self, machine: dict[str, Any]) -> dict[str, Any]:
        attempts, samples = self.client.attempts, self.sampler.samples
        reply_tokens = self.mix.run.reply_tokens
        seconds = self._end.get("seconds", round(self.host.now, 1))
        warm_up_s = self.mix.run.warm_up * self.seconds
        words = self.world.canaries
        document: dict[str, Any] = {
            "benchmark": "soak",
            "planned_minutes": self.seconds / 60,
            "minutes": round(seconds / 60, 1),
            "interrupted": self.stop.is_set(),
            "failure": self._failure,
            "seed": self.seed,
            "server": self.mix.server.flags,
            "reply_tokens": reply_tokens,
            "requests": len(attempts),
            "sessions": len(self.world.sessions),
            "outcomes": figures.outcomes(attempts),
            "errors": figures.errors(attempts),
            "crowds": self.moments.crowds,
            "planned_crowds": sum(moment.what is What.CROWD for moment in self.mix.moments),
            "latency": figures.latencies(attempts, reply_tokens),
            "hits": figures.hits(samples, attempts),
            "memory": figures.memory(samples, seconds, warm_up_s),
            "lives": self.host.as_json(),
            "words": {
                "asked": words.asked,
                "said": words.said,
                "leaks": words.leaks,
                "histories": self.world.num_histories,
                "continued": self.world.num_continued,
                "calls": self.world.num_calls,
            },
            "problems": self.world.problems,
            "twins": self.twins.as_json(),
            "end": {"running": -1, "waiting": -1, "pages_used": -1, "verify": "not run", "complaints": []}
            | self._end,
            "machine": machine,
        }
        judged = verdicts(document, samples, self.sampler.most_disk, self.mix.promises)
        document["promises"] = [verdict.as_json() for verdict in judged]
        document["minutes_of_replies"] = figures.by_minute(attempts, reply_tokens)
        document["samples"] = figures.thinned(samples)
        _write_lines(self.out / "attempts.jsonl", (attempt.as_json() for attempt in attempts))
        _write_lines(self.out / "samples.jsonl", (sample.as_json() for sample in samples))
        return document


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    """End them all; what they raise by now is not asked for."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _verify(data_dir: Path) -> str:
    """`dormouse store verify` of a folder that nobody serves from."""
    command = [sys.executable, "-m", "dormouse", "store", "verify", "--json", "--data-dir", str(data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return "clean" if done.returncode == 0 else (done.stdout + done.stderr)[-500:]


def _complaints(log: Path) -> list[str]:
    """Errors that the server logged, and what Python printed of its own accord."""
    return [line[:500] for line in log.read_text().splitlines() if _is_complaint(line)]


def _is_complaint(line: str) -> bool:
    try:
        logged = json.loads(line)
    except ValueError:
        return any(word in line for word in _COMPLAINTS)
    return isinstance(logged, dict) and (logged.get("level") in _LOUD or "exception" in logged)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
