"""A server process over the fake runtime: HTTP, engine and store are the real ones, a model's time is not.

`python -m tests.fake_server --data-dir FOLDER --port 0 --pages 64`. It takes those flags of `dormouse serve`
that tests of load need, and says the same when it is ready. It ends with 0 only if the books balance: no
request, page or block is unaccounted for. A token is a character, a page has 16. The models `a`, `b` and `c`
all say the same, and are swapped in no time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.server import Server as Process
from tests.live import strict_server
from tests.models.fake_loader import FakeLoader, NamedRuntime

from dormouse.api.app import create_app
from dormouse.api.server import Server, bind
from dormouse.cli.logs import set_up_logging
from dormouse.engine.options import EngineOptions
from dormouse.models.aliases import Aliases
from dormouse.models.host import HostOptions, ModelHost
from dormouse.store.block_store import BlockStore

PAGE = 16
DEADLINE_S = 300.0
_PROGRAM = ("-m", "tests.fake_server")


@contextmanager
def fake_server(data_dir: Path, *flags: str) -> Iterator[Process]:
    """Such a process, under the conditions of `strict_server`; the books are checked at its end."""
    with strict_server(data_dir, *flags, program=_PROGRAM) as server:
        yield server


def main() -> int:
    """Serve until SIGTERM. Raises AssertionError when something is left behind."""
    options = _parse()
    set_up_logging("warning")
    store = BlockStore.open(options.data_dir, quota_nbytes=int(options.disk_quota_gb * 1e9))
    loader = FakeLoader(
        store,
        make=lambda name: NamedRuntime(name, options.pages),
        options=EngineOptions(max_running=options.max_running, max_queue=options.max_queue),
        deadline_s=DEADLINE_S,
    )
    host = ModelHost(None, loader, HostOptions(aliases=Aliases(("default", "smollm2"))))
    started = time.monotonic()

    async def load() -> None:
        await host.start("a")

    def announce(url: str) -> None:
        sys.stdout.write(f"ready  {url} after {time.monotonic() - started:.1f} s\n")
        sys.stdout.flush()

    with bind("127.0.0.1", options.port) as listener:
        app = create_app(host, store, max_body_nbytes=1 << 20)
        Server(app, host, grace_s=5, on_ready=announce, load=load).run(sockets=[listener])
    host.stop(0.0)
    host.close()  # the loader checks the engine's books
    store.check()
    store.close()
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=256)
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument("--max-queue", type=int, default=256)
    parser.add_argument("--disk-quota-gb", type=float, default=1.0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
