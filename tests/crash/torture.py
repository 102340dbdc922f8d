"""A server that is killed over and over, under load, from outside. `make torture`; docs/durability.md says
what comes out.

    python -m tests.crash.torture [--cycles 300] [--real 20] [--seed 0] [--out docs/measurements/torture.json]

A cycle starts a server over the data folder that the kills before it left, and lets agents talk to it.
At a random moment it gets SIGKILL: while it starts, while it serves, or after SIGTERM while it ends. Then a
copy of the folder is opened: `verify` is to be clean, no agent to be short of what was told to be durable,
and every token to be that of a twin to which nothing happened. Every reply is compared with the twin's too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.crash.servers import FAKE, REAL, Killable, Model
from tests.crash.talkers import QUOTA, Script, Talker, client_of, record, turns_of

from dormouse.bench.machine import describe
from dormouse.store.block_store import BlockStore

STARTING_SHARE, STOPPING_SHARE = 0.15, 0.15
STOPPING_S = 0.4
TALK_TIMEOUT_S = 180.0
SOME_REPLIES_S = 120.0
LANES = 2
"""Data folders of the fake model that are worked on at a time."""


@dataclass
class Torture:
    """The cycles of one model over one data folder."""

    model: Model
    base: Path
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    starts_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._folder = self.base / "data"
        scripts: list[Script] = record(self.model, self.base / "twin")
        self.talkers = [
            Talker(number, script, self.model, random.Random(self._rng.random()), self.counts)
            for number, script in enumerate(scripts)
        ]

    def cycle(self) -> None:
        """Start, talk, kill, examine. Raises AssertionError for anything that was promised and is not so."""
        sync = self._rng.random() < 0.5
        server = self.model.server(self._folder, "sync" if sync else "async")
        try:
            self._end(server, sync)
        finally:
            server.kill()
        self._examine()
        self.counts["cycles"] += 1

    def _end(self, server: Killable, sync: bool) -> None:
        chance = self._rng.random()
        if self.starts_s and chance < STARTING_SHARE:
            if not server.wait_until_ready(self._rng.uniform(0, self.starts_s[-1])):
                self.kills["while it starts"] += 1
                server.kill()
                return
        elif not server.wait_until_ready():
            raise AssertionError(f"the server does not start:\n{server.last_words()}")
        self.starts_s.append(server.ready_s)
        self._talk(server, sync, stop_first=chance > 1 - STOPPING_SHARE)

    def _talk(self, server: Killable, sync: bool, stop_first: bool) -> None:
        stop = threading.Event()
        with client_of(server) as client:
            threads = [
                threading.Thread(target=talker.run, args=(client, stop, sync)) for talker in self.talkers
            ]
            for thread in threads:
                thread.start()
            self._let_talk(threads, stop)
            if stop_first:
                server.terminate()
                stop.wait(self._rng.uniform(0, STOPPING_S))
            doing = [talker.doing for talker in self.talkers if talker.doing]
            was_alive = server.is_alive
            server.kill()
            stop.set()
            for thread in threads:
                thread.join(TALK_TIMEOUT_S)
                assert not thread.is_alive(), "a client waits for a server that is gone"
        if not stop_first:
            phase = "while it replies" if "reply" in doing else "while it serves, no reply under way"
        else:
            phase = "while it ends" if was_alive else "had ended"
        self.kills[phase] += 1
        self.cut.update(doing)
        for talker in self.talkers:
            if talker.error is not None:
                raise talker.error

    def _let_talk(self, threads: list[threading.Thread], stop: threading.Event) -> None:
        """Until some replies have come, which takes long on a busy machine, and a moment more."""
        wanted = self.counts["replies_compared"] + self._rng.randrange(2 * len(threads))
        deadline = time.monotonic() + SOME_REPLIES_S
        while self.counts["replies_compared"] < wanted and time.monotonic() < deadline:
            if not any(thread.is_alive() for thread in threads):
                return
            stop.wait(0.02)
        stop.wait(self._rng.uniform(0, self.model.load_s))

    def _examine(self) -> None:
        """Look at a copy of what the kill left: the next start is to find it as it is."""
        copy = self.base / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        if not self._folder.exists():
            return
        shutil.copytree(self._folder, copy)
        with BlockStore.open(copy, quota_nbytes=QUOTA) as store:
            store.check()
            report = store.verify()
            problems = list(turns_of(store, self.talkers))
            assert store.stats().notes == (), store.stats().notes
        assert report.is_clean, report
        assert not problems, problems
        assert not list((copy / "quarantine").iterdir()), "a kill damages nothing"
        self.counts["verified_clean"] += 1
        self.counts["blocks_verified"] += report.num_blocks
        self.counts["bytes_verified"] += report.nbytes
        self.counts["agents_compared"] += sum(len(talker.expected()) for talker in self.talkers)

    def row(self) -> dict[str, Any]:
        """What came out."""
        return {
            "model": self.model.name,
            "seed": self.seed,
            "agents": self.model.num_agents,
            **self.counts,
            "kills": dict(self.kills),
            "cut_under_way": dict(self.cut),
            "start_s": {
                "median": round(statistics.median(self.starts_s), 2),
                "max": round(max(self.starts_s), 2),
            },
        }


def torture(
    model: Model, num_cycles: int, seed: int, base: Path | None = None, until: float = math.inf
) -> dict[str, Any]:
    """So many cycles, none of which begins after `until` (monotonic seconds); a row for the report."""
    with TemporaryDirectory(dir=base, prefix="torture-") as folder:
        run = Torture(model, Path(folder), seed)
        for number in range(num_cycles):
            if time.monotonic() > until:
                break
            try:
                run.cycle()
            except AssertionError:
                sys.stderr.write(f"{model.name}, seed {seed}, cycle {number}: {run.row()}\n")
                raise
            sys.stderr.write(f"{model.name}: {number + 1} of {num_cycles} cycles\n")
        return run.row()


def main() -> None:
    """Run it and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=300, help="in all")
    parser.add_argument("--real", type=int, default=20, help="of them with the real model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=120, help="begin no cycle after that")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began = time.monotonic()
    machine = describe()
    num_fake = options.cycles - options.real
    shares = [(num_fake + lane) // LANES for lane in range(LANES)]
    plan = [*((FAKE, share) for share in shares), (REAL, options.real)]
    with ThreadPoolExecutor(len(plan)) as threads:
        runs = [
            threads.submit(torture, model, cycles, options.seed + lane, until=began + 60 * options.minutes)
            for lane, (model, cycles) in enumerate(plan)
            if cycles
        ]
        rows = [run.result() for run in runs]
    report = {
        "machine": machine,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "seconds": round(time.monotonic() - began),
        "cycles": sum(row["cycles"] for row in rows),
        "rows": rows,
    }
    text = json.dumps(report, indent=1) + "\n"
    if options.out is None:
        sys.stdout.write(text)
    else:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
