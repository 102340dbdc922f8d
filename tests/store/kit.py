"""Tiny blocks, deterministic payloads and faulty disks for the tests of the store."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

from dormouse.domain.agents import AgentId, AgentUpdate
from dormouse.domain.blocks import BlockKey, Link, Namespace, chain_links, namespace_of
from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.store.block_store import BlockStore
from dormouse.store.file_ops import FileOps
from dormouse.store.reader import LoadError

CACHE = CacheSpec.for_heads(KVFormat.K8V4, 16, num_layers=2, num_kv_heads=1, k_head_dim=64, v_head_dim=64)
BLOCK_SIZE = CACHE.block_size
NAMESPACE = namespace_of("toy model", CACHE.fingerprint(), "acme")
QUOTA = 64 << 20
WAIT_S = 20.0

OpenStore = Callable[..., BlockStore]
"""The fixture `open_store`: quota_nbytes, options and file_ops, all by name and optional."""


def links_of(tokens: Sequence[int], namespace: Namespace = NAMESPACE) -> list[Link]:
    return list(chain_links(namespace, tokens, BLOCK_SIZE))


def payload_of(key: BlockKey) -> bytes:
    """Bytes that no other block has."""
    return (key * (CACHE.block_nbytes // len(key) + 1))[: CACHE.block_nbytes]


def agent_id(name: str, namespace: Namespace = NAMESPACE) -> AgentId:
    return AgentId("acme", name, namespace)


def put_all(store: BlockStore, links: Sequence[Link], namespace: Namespace = NAMESPACE) -> None:
    for link in links:
        assert store.put(namespace, link, payload_of(link.key))


def update_of(name: str, links: Sequence[Link], rest: Sequence[int] = ()) -> AgentUpdate:
    return AgentUpdate(agent_id(name), "toy", tuple(links), tuple(rest))


def save(store: BlockStore, name: str, links: Sequence[Link], rest: Sequence[int] = ()) -> bool:
    """Save an agent and wait for the answer."""
    answers: SimpleQueue[bool] = SimpleQueue()
    store.save_agent(update_of(name, links, rest), answers.put)
    return answers.get(timeout=WAIT_S)


def reply(store: BlockStore, name: str, tokens: Sequence[int], rest: Sequence[int] = ()) -> list[Link]:
    """What a reply does: its blocks, its tail, its agent; durable on return."""
    links = links_of(tokens)
    put_all(store, links)
    assert save(store, name, links, rest)
    return links


def load(store: BlockStore, key: BlockKey) -> tuple[LoadError | None, bytes]:
    buffer = bytearray(CACHE.block_nbytes)
    answers: SimpleQueue[LoadError | None] = SimpleQueue()
    store.load(key, memoryview(buffer), answers.put)
    return answers.get(timeout=WAIT_S), bytes(buffer)


def assert_loads(store: BlockStore, links: Sequence[Link]) -> None:
    for link in links:
        assert load(store, link.key) == (None, payload_of(link.key))


def block_path(folder: Path, key: BlockKey, namespace: Namespace = NAMESPACE) -> Path:
    return folder / "blocks" / namespace.hex() / key.hex()[:2] / f"{key.hex()}.safetensors"


def block_files(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "blocks").rglob("*.safetensors")}


def nbytes_below(folder: Path) -> int:
    """Bytes of all files; one that goes while it is looked at counts as gone."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(base) / name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


@contextmanager
def ram_folder() -> Iterator[Path]:
    """A folder in memory where there is one: no test cuts the power, and fsync is most of the time."""
    ram = Path("/dev/shm")
    with TemporaryDirectory(dir=ram if os.access(ram, os.W_OK) else None) as place:
        yield Path(place)


class Clock:
    """Unix time that only moves when told to."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FaultyOps(FileOps):
    """Real files, and at every step a hook that may raise, wait or end the process."""

    def __init__(self, before: Callable[[str, object], None]) -> None:
        self._before = before

    def make_folder(self, folder: Path) -> None:
        self._before("make_folder", folder)
        super().make_folder(folder)

    def open_temp(self, path: Path) -> int:
        self._before("open_temp", path)
        return super().open_temp(path)

    def write(self, fd: int, parts: Sequence[bytes]) -> None:
        try:
            self._before("write", fd)
        except OSError:
            super().write(fd, parts[:1])
            raise
        super().write(fd, parts)

    def fsync(self, fd: int) -> None:
        self._before("fsync", fd)
        super().fsync(fd)

    def close(self, fd: int) -> None:
        super().close(fd)
        self._before("close", fd)

    def rename(self, source: Path, target: Path) -> None:
        self._before("rename", target)
        super().rename(source, target)

    def fsync_folder(self, folder: Path) -> None:
        self._before("fsync_folder", folder)
        super().fsync_folder(folder)

    def wipe(self, path: Path) -> None:
        self._before("wipe", path)
        super().wipe(path)

    def unlink(self, path: Path) -> None:
        self._before("unlink", path)
        super().unlink(path)

    def commit(self, connection: sqlite3.Connection) -> None:
        self._before("commit", connection)
        super().commit(connection)

    def fold(self, connection: sqlite3.Connection) -> None:
        self._before("fold", connection)
        super().fold(connection)


class FailingOps(FaultyOps):
    """Fails the steps named in `errors`, for as long as they are there."""

    def __init__(self) -> None:
        super().__init__(self._raise)
        self.errors: dict[str, Exception] = {}

    def _raise(self, step: str, _: object) -> None:
        if step in self.errors:
            raise self.errors[step]


class GatedOps(FaultyOps):
    """Holds the writer at a step until the gate opens."""

    def __init__(self, step: str) -> None:
        super().__init__(self._wait)
        self._step = step
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()

    def _wait(self, step: str, _: object) -> None:
        if step == self._step and not self.gate.is_set():
            self.reached.set()
            assert self.gate.wait(WAIT_S), "the test forgot to open the gate"


class UnsyncedOps(FileOps):
    """For tests that write much and kill nothing."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_folder(self, folder: Path) -> None:
        pass


class RecordingOps(FaultyOps):
    """Remembers the steps and what they were about."""

    def __init__(self) -> None:
        super().__init__(lambda step, what: self.steps.append((step, what)))
        self.steps: list[tuple[str, object]] = []
