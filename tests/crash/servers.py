"""Servers that are started to be killed: one of the command line, one over the fake runtime."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from tests.crash import fake_server

ROOT = Path(__file__).parents[2]
END_TIMEOUT_S = 180.0
READY_TIMEOUT_S = 180.0
LAST_LINES = 30
_READY = re.compile(r"ready\s+(http://\S+) after")


class Killable(ABC):
    """A server process that is just starting. `ready_s` is from its start to its being ready."""

    def __init__(self) -> None:
        self.url = ""
        self.ready_s = 0.0
        self._started = time.monotonic()

    def wait_until_ready(self, timeout_s: float = READY_TIMEOUT_S) -> bool:
        """Whether it answers within that time. Raises RuntimeError when it ended instead."""
        url = self._next_url(timeout_s)
        if url is None:
            return False
        if not url:
            raise RuntimeError(f"the server did not start:\n{self.last_words()}")
        self.url = url
        self.ready_s = time.monotonic() - self._started
        return True

    @abstractmethod
    def _next_url(self, timeout_s: float) -> str | None:
        """Its URL, nothing when it ended, None when it takes longer."""

    @abstractmethod
    def last_words(self) -> str:
        """What it printed last."""

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """Whether it has not ended."""

    @abstractmethod
    def terminate(self) -> None:
        """SIGTERM."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL, and wait for its end; one that ended meanwhile is fine."""

    @abstractmethod
    def join(self) -> int | None:
        """Wait for its end; returns the exit code."""


class CommandServer(Killable):
    """`dormouse serve` over the real model."""

    def __init__(self, folder: Path, durability: str) -> None:
        super().__init__()
        flags = ("--port", "0", "--arena-tokens", "2048", "--block-size", "32", "--grace-s", "1")
        where = ("--data-dir", str(folder), "--durability", durability)
        self._lines: list[str] = []
        self._urls: SimpleQueue[str] = SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dormouse", "serve", *flags, *where],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def last_words(self) -> str:
        return "".join(self._lines[-LAST_LINES:])

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self.join()

    def join(self) -> int | None:
        code = self._process.wait(END_TIMEOUT_S)
        self._reader.join(END_TIMEOUT_S)
        return code

    def _next_url(self, timeout_s: float) -> str | None:
        try:
            return self._urls.get(timeout=timeout_s)
        except Empty:
            return None

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self._lines.append(line)
                if found := _READY.search(line):
                    self._urls.put(found[1])
        self._urls.put("")


class FakeServer(Killable):
    """The same server over the fake runtime, forked from a process that has its imports."""

    def __init__(self, folder: Path, durability: str) -> None:
        super().__init__()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.crash.fake_server"])
        self._log = folder.with_suffix(".log")
        self._urls, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=fake_server.main, args=(folder, durability, self._log, sender))
        self._process.start()
        sender.close()

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines(keepends=True)
        return "".join(lines[-LAST_LINES:])

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self.join()
        self._urls.close()

    def join(self) -> int | None:
        self._process.join(END_TIMEOUT_S)
        return self._process.exitcode

    def _next_url(self, timeout_s: float) -> str | None:
        if not self._urls.poll(timeout_s):
            return None
        with contextlib.suppress(EOFError):
            return str(self._urls.recv())
        return ""


@dataclass(frozen=True, slots=True)
class Model:
    """What is served, and how its agents talk. Each of `num_agents` says `num_turns` things and has replies
    of `reply_tokens`; `load_s` is how long a server is under load before it is killed, at most."""

    name: str
    server: type[CommandServer] | type[FakeServer]
    num_agents: int
    num_turns: int
    reply_tokens: int
    load_s: float


FAKE = Model("fake", FakeServer, num_agents=6, num_turns=10, reply_tokens=40, load_s=2.0)
REAL = Model("smollm2", CommandServer, num_agents=4, num_turns=6, reply_tokens=12, load_s=6.0)
