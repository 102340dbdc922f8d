"""`make compare`: start Dormouse and its peers, drive them alike, write rows, charts and the page.

`python -m benchmarks.compare --only prefill,decode --servers dormouse,llamacpp --scale small` takes a part.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.compare import page
from benchmarks.compare.agents import Rotation
from benchmarks.compare.decode import decode
from benchmarks.compare.density import asleep, density
from benchmarks.compare.fleet import Fleet, Say
from benchmarks.compare.mixed import mixed
from benchmarks.compare.peers import Peer, peers
from benchmarks.compare.prefill import prefill
from benchmarks.compare.restart import restart
from benchmarks.compare.rows import Board, Table
from benchmarks.compare.scale import SCALES, Scale
from benchmarks.compare.texts import Texts
from dormouse.bench.machine import describe
from dormouse.models.folder import ModelFolder
from dormouse.models.sources import resolve
from dormouse.settings import Settings

ROOMY = {"prefill": prefill, "decode": decode, "mixed": mixed}
TIGHT = ("agents", "restart", "density")
WORKLOADS = (*ROOMY, *TIGHT)


def main() -> int:
    """Run the chosen workloads; their tables replace those of earlier runs."""
    options = _parser().parse_args()
    # Told to end, it ends its servers first: those that are paused would stay for ever.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    model = resolve("smollm2", Settings().models_dir)
    variants = dict(variant.partition("=")[::2] for variant in options.dormouse or ["dormouse="])
    chosen = _choose(peers(model.path, variants), options.servers)
    run = Run(chosen, model, SCALES[options.scale], options.out, _say_since(time.monotonic()))
    only = options.only.split(",") if options.only else list(WORKLOADS)
    if unknown := sorted(set(only) - set(WORKLOADS)):
        raise SystemExit(f"no workload is called {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    with tempfile.TemporaryDirectory(prefix="dormouse-compare-", dir=options.scratch) as scratch:
        run.measure(only, Path(scratch))
    written = page.write(options.out)
    run.say(f"written: {written}")
    return 0


@dataclasses.dataclass(frozen=True)
class Run:
    """What is compared, how much of it, and where the rows go."""

    peers: list[Peer]
    model: ModelFolder
    scale: Scale
    out: Path
    say: Say

    def measure(self, only: list[str], scratch: Path) -> None:
        """First with memory enough, then with too little: a server gets its budget as it starts."""
        roomy = [name for name in ROOMY if name in only]
        if roomy:
            with Fleet.open(self.peers, scratch / "roomy", self.scale.roomy, self.say) as fleet:
                for name in roomy:
                    self._save(ROOMY[name](fleet, Texts(self.model.path), self.scale))
        if set(only) & set(TIGHT):
            self._measure_agents(scratch)

    def _measure_agents(self, scratch: Path) -> None:
        """One story: agents in rotation, the restart, what they take. It has no parts to be run alone."""
        texts = Texts(self.model.path)
        peers = [peer for peer in self.peers if not peer.only]
        with Fleet.open(peers, scratch / "tight", self.scale.tight, self.say) as fleet:
            rotation = Rotation(fleet, texts, self.scale)
            self._save(rotation.run())
            restarted = restart(fleet, self.scale, rotation)
            self._save(restarted)
            board = density(fleet, self.scale, rotation, restarted)
        asleep(board, peers, scratch / "asleep", texts, self.scale, self.say)
        self._save(board)

    def _save(self, board: Board) -> None:
        settings: dict[str, Any] = dataclasses.asdict(self.scale)
        settings |= {"roomy_nbytes": self.scale.roomy.nbytes, "tight_nbytes": self.scale.tight.nbytes}
        servers = {peer.name: peer.describe() for peer in self.peers}
        table = Table(board.workload, settings, servers, describe(), tuple(board.rows()))
        self.say(f"written: {table.save(self.out)}")


def _choose(all_peers: list[Peer], names: str | None) -> list[Peer]:
    if not names:
        return all_peers
    known = {peer.name: peer for peer in all_peers}
    if unknown := [name for name in names.split(",") if name not in known]:
        raise SystemExit(f"no server is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names.split(",")]


def _say_since(started: float) -> Say:
    def say(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - started:7.1f} s  {line}\n")
        sys.stderr.flush()

    return say


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAMES", help=f"workloads, of {','.join(WORKLOADS)}")
    parser.add_argument("--servers", metavar="NAMES", help="servers, separated by commas; all by default")
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument(
        "--dormouse",
        action="append",
        metavar="NAME=FLAGS",
        help="a Dormouse with more flags of `dormouse serve`, e.g. 'dormouse-q4=--kv-format q4'; "
        "may be repeated",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/compare"),
        help="folder of the rows; the page goes beside them",
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder for data of the servers; a temporary one by default"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
