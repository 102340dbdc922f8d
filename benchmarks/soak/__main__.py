"""`make soak`: an hour of agents against a real server, and whether every promise was kept.

`python -m benchmarks.soak --minutes 3` is what CI runs. The exit code is 1 when a promise was broken, 2 when
the run itself failed or was interrupted; the document is written in any case.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.soak.mix import MIX, Mix
from benchmarks.soak.promises import BROKEN
from benchmarks.soak.soak import Soak


def main() -> int:
    """Run it, write `soak.json`, say what was promised and what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mix", type=Path, default=MIX, help="a TOML file like benchmarks/soak/mix.toml")
    parser.add_argument("--raw", type=Path, default=Path("build/soak"), help="folder of raw records and logs")
    parser.add_argument(
        "--out", type=Path, help="the document; soak.json in the folder of raw records, if not given"
    )
    options = parser.parse_args()
    options.raw.mkdir(parents=True, exist_ok=True)
    for old in options.raw.glob("*.log"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="dormouse-soak-") as folder:
        document = asyncio.run(_run(options, Path(folder)))
    out: Path = options.out or options.raw / "soak.json"
    out.write_text(_dump(document))
    _say(document, out)
    if document["failure"] or document["interrupted"]:
        return 2
    return 1 if any(row["state"] == BROKEN for row in document["promises"]) else 0


async def _run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    soak = Soak(Mix.load(options.mix), options.seed, 60 * options.minutes, folder, options.raw)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, soak.stop.set)
    return await soak.run()


def _dump(document: dict[str, Any]) -> str:
    """JSON with a line for each key, and for each row of a list."""
    lines = []
    for key, value in document.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _say(document: dict[str, Any], out: Path) -> None:
    lines = [
        f"{row['state']:>10}  {row['promise']}: {row['figure']} ({row['bound']})"
        + (f"\n            {row['remark']}" if row["remark"] else "")
        for row in document["promises"]
    ]
    if document["failure"]:
        lines.append(document["failure"])
    lines.append(f"{document['requests']} requests in {document['minutes']} minutes; written: {out}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
