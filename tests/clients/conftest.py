"""A server with room for the prompts of coding clients, a recorder before it, and programs that reach nothing
else."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from benchmarks.server import Server, serve
from tests.clients.__main__ import FOLDER
from tests.clients.recorder import Recorder, recording
from tests.docs.clients_page import commands

from dormouse.models.folder import ModelFolder

MODEL = "smollm2"
RUN_TIMEOUT_S = 1500.0
"""The first prompts of coding clients are up to 20,000 tokens; on two busy cores they take minutes."""

Run = Callable[..., str]


@pytest.fixture(scope="session", autouse=True)
def _alone() -> None:
    """Nothing but loopback: clients that would ask anybody else must do without."""
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    if others:
        pytest.skip("not cut off from the network: run `make clients`, which needs user namespaces")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2: ModelFolder) -> Iterator[Server]:
    assert smollm2.path
    ((_, _, *flags),) = commands("Room for coding clients")
    with serve(tmp_path_factory.mktemp("data"), *flags) as server:
        yield server


@pytest.fixture
def recorder(server: Server) -> Iterator[Recorder]:
    with recording(server.url) as recorder:
        yield recorder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home folder."""
    home = tmp_path / "home"
    home.mkdir()
    return home


@pytest.fixture
def run(tmp_path: Path, home: Path) -> Run:
    """Runs an installed program to its end and returns what it printed; nothing is inherited but PATH."""
    folder = tmp_path / "work"
    folder.mkdir()

    def run(program: Path, *arguments: str, **variables: str) -> str:
        done = subprocess.run(
            [str(program), *arguments],
            env={"PATH": os.environ["PATH"], "HOME": str(home), **variables},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def installed(path: str) -> Path:
    """Something that `make clients` installs."""
    found = FOLDER / path
    if not found.exists():
        pytest.skip(f"{path} is not installed: its package was not to be had, or run `make clients`")
    return found
