"""A Dormouse server as a process: started, found, killed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

DORMOUSE = ("-m", "dormouse", "serve")
"""What Python runs, before the flags."""

START_TIMEOUT_S = 300.0
END_TIMEOUT_S = 180.0
_READY = re.compile(r"ready\s+(http://\S+) after ([\d.]+) s")


@dataclass
class Server:
    """A running server. `ready_s` is from process start to answering."""

    process: subprocess.Popen[str]
    url: str
    ready_s: float

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL: no goodbye."""
        self.process.kill()
        self.process.wait(END_TIMEOUT_S)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_TIMEOUT_S)

    def client(self) -> httpx.Client:
        """A client of this server, for any number of threads; the caller closes it."""
        return httpx.Client(base_url=self.url, timeout=600, limits=httpx.Limits(max_connections=None))


@contextmanager
def serve(
    data_dir: Path, *flags: str, log: Path | None = None, program: tuple[str, ...] = DORMOUSE
) -> Iterator[Server]:
    """A server on a free port, ended at the end however it goes. `log` gets what it prints; `program` may be
    another one that takes these flags and says so when it is ready.

    Raises RuntimeError with its last lines when it does not start.
    """
    command = [sys.executable, *program, "--port", "0", "--data-dir", str(data_dir), *flags]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines: list[str] = []
        reader = threading.Thread(target=_read, args=(process, lines, log))
        reader.start()
        try:
            url = _wait_until_ready(process, lines, started)
            yield Server(process, url, time.monotonic() - started)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(END_TIMEOUT_S)
            reader.join(END_TIMEOUT_S)


def _read(process: subprocess.Popen[str], lines: list[str], log: Path | None) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if log is not None:
            with log.open("a") as file:
                file.write(line)


def _wait_until_ready(process: subprocess.Popen[str], lines: list[str], started: float) -> str:
    while time.monotonic() < started + START_TIMEOUT_S:
        for line in lines.copy():
            if found := _READY.search(line):
                return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError("the server did not start:\n" + "".join(lines[-20:]))
