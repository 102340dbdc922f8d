"""One server for each module."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from benchmarks.server import Server, serve

FLAGS = ("--arena-tokens", "8192", "--speculation", "off")
"""Without guesses a piece of a stream is a token."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("suite") / "data", *FLAGS) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
