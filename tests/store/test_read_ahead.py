"""Blocks that will be loaded soon are asked for on a thread of their own, as hints."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from queue import Empty, SimpleQueue

import pytest
from tests.store.kit import BLOCK_SIZE, WAIT_S, OpenStore, assert_loads, block_path, links_of, put_all

from dormouse.domain.blocks import BlockKey
from dormouse.store.block_store import BlockStore

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nothing to ask with")


class Advised:
    """In place of the system: which files were asked for. Waits inside while `gate` is closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: SimpleQueue[Path] = SimpleQueue()
        self.gate = threading.Event()
        self.gate.set()
        monkeypatch.setattr(os, "posix_fadvise", self._advise)

    def _advise(self, fd: int, start: int, length: int, advice: int) -> None:
        assert (start, advice) == (0, os.POSIX_FADV_WILLNEED)
        assert length == os.fstat(fd).st_size
        self.paths.put(Path(f"/proc/self/fd/{fd}").readlink())
        assert self.gate.wait(WAIT_S)


def test_the_files_are_asked_for_in_order(
    store: BlockStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised = Advised(monkeypatch)
    links = links_of(range(3 * BLOCK_SIZE))
    put_all(store, links)
    assert store.flush()
    unknown = BlockKey(bytes(32))
    store.read_ahead([unknown, *(link.key for link in links)])
    asked = [advised.paths.get(timeout=WAIT_S) for _ in links]
    assert asked == [block_path(folder, link.key).resolve() for link in links]


def test_no_load_waits_for_a_hint(store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    advised = Advised(monkeypatch)
    links = links_of(range(3 * BLOCK_SIZE))
    put_all(store, links)
    assert store.flush()
    advised.gate.clear()
    store.read_ahead([link.key for link in links])
    advised.paths.get(timeout=WAIT_S)
    assert_loads(store, links)
    advised.gate.set()


def test_a_file_that_is_gone_is_left_to_the_load(
    store: BlockStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised = Advised(monkeypatch)
    links = links_of(range(2 * BLOCK_SIZE))
    put_all(store, links)
    assert store.flush()
    block_path(folder, links[0].key).unlink()
    store.read_ahead([link.key for link in links])
    assert advised.paths.get(timeout=WAIT_S) == block_path(folder, links[1].key).resolve()
    assert store.contains(links[0].key), "a hint decides nothing"


def test_closing_drops_what_is_queued(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    advised = Advised(monkeypatch)
    store = open_store()
    links = links_of(range(4 * BLOCK_SIZE))
    put_all(store, links)
    assert store.flush()
    advised.gate.clear()
    store.read_ahead([link.key for link in links])
    advised.paths.get(timeout=WAIT_S)
    thread = store._read_ahead._thread
    join = thread.join

    def open_the_gate_and_join() -> None:
        advised.gate.set()
        join(WAIT_S)

    monkeypatch.setattr(thread, "join", open_the_gate_and_join)
    store.close()
    assert not thread.is_alive()
    with pytest.raises(Empty):
        advised.paths.get_nowait()
    store.read_ahead([links[0].key])


def test_systems_without_the_call_go_without(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    store = open_store()
    links = links_of(range(BLOCK_SIZE))
    put_all(store, links)
    assert store.flush()
    store.read_ahead([link.key for link in links])
    assert_loads(store, links)
