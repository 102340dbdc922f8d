"""What tests of the real server share: processes that complain aloud, clients that start at once, sessions
shaped like Claude Code's, and a look into the data folder. docs/testing.md says how to use them."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from benchmarks.server import DORMOUSE, Server, serve
from safetensors import safe_open

from dormouse.models.runtimes import RuntimeName

T = TypeVar("T")

RUNTIMES: tuple[RuntimeName, ...] = ("torch", "mlx")

WAIT_S = 60.0
COMPLAINTS = ("Warning", "Traceback", "ERROR", "never retrieved", "was destroyed")
"""What a server in Python's development mode prints when something was left open or went wrong."""


@contextmanager
def strict_server(
    data_dir: Path,
    *flags: str,
    complaints: tuple[str, ...] = COMPLAINTS,
    runtime: RuntimeName = "torch",
    program: tuple[str, ...] = DORMOUSE,
    dev_mode: bool = True,
) -> Iterator[Server]:
    """A server in Python's development mode, unless that would spoil figures, with warnings as errors; one on
    mlx has no torch to import.

    It ends by SIGTERM with 0, and none of `complaints` is in what it printed. A test may stop it itself.
    """
    log = data_dir.parent / f"{data_dir.name}.log"
    with ExitStack() as running:
        with pytest.MonkeyPatch.context() as patch:  # its environment is no other server's
            if dev_mode:
                patch.setenv("PYTHONDEVMODE", "1")
            patch.setenv("PYTHONWARNINGS", "error")
            if runtime == "mlx":
                hide_module("torch", data_dir.parent, patch)
                flags = ("--runtime", "mlx", *flags)
            server = running.enter_context(serve(data_dir, *flags, log=log, program=program))
        yield server
        if server.process.poll() is None:
            server.stop()
        assert server.process.returncode == 0
    text = log.read_text()
    assert not [complaint for complaint in complaints if complaint in text], text


def hide_module(name: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Processes that are started from now on find no module `name`, as where it is not installed.

    `folder` gets a file for it; call it with one folder for all names.
    """
    with (folder / "sitecustomize.py").open("a") as file:
        file.write(f"import sys\nsys.modules[{name!r}] = None\n")
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if str(folder) not in paths:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *paths]))


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of all `calls`, each in a thread of its own, let go by one barrier."""
    barrier = threading.Barrier(len(calls), timeout=WAIT_S)

    def run(call: Callable[[], T]) -> T:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return [running.result() for running in [threads.submit(run, call) for call in calls]]


def wait_for(client: httpx.Client, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The engine's counts (`/health`), as soon as `condition` holds of them. Raises TimeoutError."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        counts: dict[str, Any] = client.get("/health").json()["engine"]
        if condition(counts):
            return counts
    raise TimeoutError(f"after {WAIT_S:g} s the engine still says {counts}")


def block_files(data_dir: Path) -> list[Path]:
    """All block files of a data folder."""
    return sorted((data_dir / "blocks").rglob("*.safetensors"))


def block_metadata(file: Path) -> dict[str, str]:
    """What a block file says about itself."""
    with safe_open(file, "numpy") as opened:
        return dict(opened.metadata())


@dataclass(frozen=True)
class Turn:
    """An answer in Anthropic's dialect, and when its events came (seconds of the monotonic clock)."""

    events: list[dict[str, Any]]
    began: float
    first_text: float
    ended: float

    @property
    def kinds(self) -> list[str]:
        """Types of the events, pings left out, runs of deltas as one."""
        kinds = [event["type"] for event in self.events if event["type"] != "ping"]
        return [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]

    @property
    def text(self) -> str:
        """All that was said."""
        deltas = [event["delta"] for event in self.events if event["type"] == "content_block_delta"]
        return "".join(delta.get("text", "") for delta in deltas)

    @property
    def stop_reason(self) -> str:
        """Why it ended."""
        reason: str = next(e for e in self.events if e["type"] == "message_delta")["delta"]["stop_reason"]
        return reason

    @property
    def usage(self) -> dict[str, int]:
        """The final usage."""
        used: dict[str, int] = next(e for e in self.events if e["type"] == "message_delta")["usage"]
        return used

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were found."""
        return self.usage["cache_read_input_tokens"]

    @property
    def prompt_tokens(self) -> int:
        """All prompt tokens."""
        parts = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        return sum(self.usage[part] for part in parts)


SYSTEM = "You help with the files of one project. " + " ".join(
    f"Rule {n}: say what you are going to do before you change file number {n}." for n in range(12)
)
REMINDER = "The working directory is clean. Nobody else is editing."
TOOLS = [
    {
        "name": f"{verb}_{noun}",
        "description": f"{verb.capitalize()} one {noun} of the project. Give the whole path.",
        "input_schema": {
            "type": "object",
            "properties": {
                "path": {"type": "string", "description": f"Where the {noun} is."},
                "limit": {"type": "integer"},
            },
            "required": ["path"],
        },
    }
    for verb in ("read", "write", "find", "move", "count", "check")
    for noun in ("file", "folder", "branch", "commit")
]


@dataclass
class CodingSession:
    """One session shaped like Claude Code's, with texts of our own: system blocks the first of which is a
    billing line that is never the same, 24 tools, a `system` message within the messages, the session in a
    header and in the metadata, adaptive thinking, streamed."""

    id: str
    canary: str
    turns: list[Turn] = field(default_factory=list)
    _messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def agent(self) -> str:
        """Name of its agent."""
        return f"claude-code/{self.id}"

    def say(self, url: str, text: str, *, max_tokens: int = 24) -> Turn:
        """One turn; raises RuntimeError with the body for an HTTP error."""
        self._messages.append({"role": "user", "content": [{"type": "text", "text": text}]})
        if len(self._messages) == 1:
            self._messages.append({"role": "system", "content": f"{REMINDER} The word is {self.canary}."})
        turn = self._stream(url, self.body(max_tokens))
        self._messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.text}]})
        self.turns.append(turn)
        return turn

    def body(self, max_tokens: int) -> dict[str, Any]:
        """The request as it would be sent now."""
        number = len(self._messages)
        billing = f"x-anthropic-billing-header: cc_version=2.1.0.{self.id[:3]}; cch={number:05x};"
        cached = {"type": "ephemeral"}
        return {
            "model": "claude-sonnet-4-5",
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "system": [
                {"type": "text", "text": billing},
                {"type": "text", "text": "You are a careful assistant.", "cache_control": cached},
                {"type": "text", "text": SYSTEM, "cache_control": cached},
            ],
            "tools": TOOLS,
            "messages": self._messages,
            "thinking": {"type": "adaptive"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "output_config": {"effort": "medium"},
            "metadata": {"user_id": json.dumps({"device_id": "d", "session_id": self.id})},
        }

    def _stream(self, url: str, body: dict[str, Any]) -> Turn:
        headers = {
            "anthropic-version": "2023-06-01",
            "anthropic-beta": "some-beta-2026-01-01",
            "x-claude-code-session-id": self.id,
        }
        events: list[dict[str, Any]] = []
        began, first = time.monotonic(), 0.0
        with (
            httpx.Client(base_url=url, timeout=300) as client,
            client.stream("POST", "/v1/messages?beta=true", json=body, headers=headers) as answer,
        ):
            if answer.is_error:
                raise RuntimeError(answer.read().decode())
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(json.loads(line.removeprefix("data: ")))
                    if not first and events[-1]["type"] == "content_block_delta":
                        first = time.monotonic()
        return Turn(events, began, first, time.monotonic())
