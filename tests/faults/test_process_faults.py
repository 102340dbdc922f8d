"""The real server as a process, with the real model: what only a process can run out of."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
from benchmarks.server import serve

from dormouse.models.folder import ModelFolder

pytestmark = pytest.mark.timeout(600)

QUESTION = {"messages": [{"role": "user", "content": "Count to three."}], "max_tokens": 8, "temperature": 0}


def reasons(client: httpx.Client) -> set[str]:
    return {reason["code"] for reason in client.get("/health").json()["reasons"]}


def test_a_server_without_descriptors_serves_again_when_there_are_some(
    smollm2: ModelFolder, tmp_path: Path
) -> None:
    """Connections beyond the limit wait in the system's queue; those that are open are served."""
    log = tmp_path / "log"
    with serve(tmp_path / "data", "--model", str(smollm2.path), "--arena-tokens", "2048", log=log) as server:
        address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        process = psutil.Process(server.pid)
        with server.client() as client, ExitStack() as crowd:
            expected = client.post("/v1/chat/completions", json={"model": "smollm2"} | QUESTION).json()
            before = process.num_fds()
            hard = process.rlimit(psutil.RLIMIT_NOFILE)[1]
            process.rlimit(psutil.RLIMIT_NOFILE, (before + 8, hard))
            for _ in range(32):
                crowd.enter_context(socket.create_connection(address, timeout=20))
            while "descriptors_low" not in reasons(client):
                pass  # each look is a request
            answer = client.post("/v1/chat/completions", json={"model": "smollm2"} | QUESTION)
            assert answer.json()["choices"] == expected["choices"], "an open connection is served"
            crowd.close()
            with httpx.Client(base_url=server.url, timeout=60) as late:
                again = late.post("/v1/chat/completions", json={"model": "smollm2"} | QUESTION)
                assert again.json()["choices"] == expected["choices"], "and so is a new one"
                assert "descriptors_low" not in reasons(late)
        assert server.stop() == 0
    said = " ".join(log.read_text().split())
    assert 1 <= said.count("no descriptor is left") < 30, "and not thousands of times"


def test_an_arena_that_cannot_be_mapped_is_told_at_the_start(smollm2: ModelFolder, tmp_path: Path) -> None:
    flags = [
        "--model",
        str(smollm2.path),
        "--arena-tokens",
        str(10**12),
        "--data-dir",
        str(tmp_path / "data"),
    ]
    command = [sys.executable, "-m", "dormouse", "serve", "--port", "0", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 1
    said = " ".join((ended.stdout + ended.stderr).split())
    assert "no memory for a KV arena" in said
    assert "fewer arena tokens" in said
    assert "Traceback" not in said


def test_a_start_without_memory_ends_with_a_reason(smollm2: ModelFolder, tmp_path: Path) -> None:
    """The address space ends while the model is loaded: the process ends with a message, and the data folder
    is as it was."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))

    flags = ["--model", str(smollm2.path), "--arena-tokens", "400000", "--data-dir", str(tmp_path / "data")]
    command = [sys.executable, "-m", "dormouse", "serve", "--port", "0", *flags]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False, preexec_fn=limited
    )
    assert ended.returncode == 1, ended.stderr[-2000:]
    said = " ".join((ended.stdout + ended.stderr).split())
    assert "memory" in said
    assert "Traceback" not in said
