"""Damaged files, region by region: a block that is bad costs time, never a word, and everybody is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.store.kit import (
    CACHE,
    OpenStore,
    agent_id,
    assert_loads,
    block_path,
    load,
    nbytes_below,
    put_all,
    reply,
)

from dormouse.domain.blocks import Link
from dormouse.domain.errors import DamagedBlock
from dormouse.store.files import PAYLOAD_ALIGNMENT

Damage = Callable[[bytes], bytes]


@pytest.fixture
def stored(open_store: OpenStore) -> list[Link]:
    """Ada, 40 tokens in three blocks, in a folder that nobody owns."""
    store = open_store()
    links = reply(store, "ada", range(40))
    store.close()
    return links


def _flip(position: int) -> Damage:
    def damage(data: bytes) -> bytes:
        at = position % len(data)
        return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]

    return damage


def _zeros(start: int, end: int) -> Damage:
    return lambda data: data[:start] + bytes(len(data[start:end])) + data[end:]


def _in_header(word: bytes) -> Damage:
    """The first byte of a word in the header."""
    return lambda data: _flip(data.index(word))(data)


PAYLOAD = PAYLOAD_ALIGNMENT
LAYER = CACHE.block_nbytes // 2
REGIONS: dict[str, Damage] = {
    "length of the header": _flip(0),
    "length, its highest byte": _flip(7),
    "name of a tensor": _in_header(b"layers.0.k.data"),
    "format": _in_header(b'1", "namespace'),
    "namespace": _in_header(b'namespace": "'),
    "key": _in_header(b'key": "'),
    "parent": _in_header(b'parent": "'),
    "checksum": _in_header(b'checksum": "'),
    "padding of the header": _flip(PAYLOAD - 1),
    "first byte of the payload": _flip(PAYLOAD),
    "second layer": _flip(PAYLOAD + LAYER),
    "last byte of the payload": _flip(PAYLOAD + CACHE.block_nbytes - 1),
    "tokens": _flip(-4),
    "last byte": _flip(-1),
    "a sector of zeros": _zeros(PAYLOAD, PAYLOAD + 512),
    "a header of zeros": _zeros(0, PAYLOAD),
    "all zeros": _zeros(0, 1 << 30),
}


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("has_catalog", [True, False])
def test_damage_anywhere_costs_time_and_no_text(
    open_store: OpenStore,
    folder: Path,
    stored: list[Link],
    region: str,
    has_catalog: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = block_path(folder, stored[1].key)
    path.write_bytes(REGIONS[region](path.read_bytes()))
    if not has_catalog:
        (folder / "catalog.sqlite").unlink()
    store = open_store()
    report = store.verify()
    found_at_start = not report.damaged
    assert found_at_start <= (not has_catalog), "with its row, a file is only looked at when it is read"
    assert not store.contains(stored[1].key)
    (aside,) = (folder / "quarantine").iterdir()
    assert aside.name.endswith(path.name)
    assert store.stats().quarantine_nbytes == aside.stat().st_size
    assert store.stats().counts["damaged"] == len(report.damaged)
    assert "is damaged and will be computed again" in caplog.text or "can be used" in caplog.text
    assert store.health() == (), (
        "a damaged block is mended by computing it: nothing keeps the server from serving"
    )
    if has_catalog:
        assert store.history(agent_id("ada")) == list(range(40))
        assert store.agent("acme", "ada").durable_tokens == 16
    put_all(store, [stored[1]])
    assert store.flush()
    assert_loads(store, stored)
    assert store.verify().is_clean
    assert store.stats().nbytes == nbytes_below(folder)


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 100, PAYLOAD - 1, PAYLOAD, PAYLOAD + 100, -4, -1])
def test_a_cut_file_is_found_at_start(
    open_store: OpenStore, folder: Path, stored: list[Link], nbytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = block_path(folder, stored[1].key)
    os.truncate(path, nbytes % path.stat().st_size)
    store = open_store()
    assert not store.contains(stored[1].key)
    assert "is not a block that can be used" in caplog.text
    assert store.history(agent_id("ada")) == list(range(40))
    assert store.verify().is_clean


def test_a_file_that_grew_is_found_at_start(open_store: OpenStore, folder: Path, stored: list[Link]) -> None:
    path = block_path(folder, stored[1].key)
    path.write_bytes(path.read_bytes() + b"more")
    assert not open_store().contains(stored[1].key)


@pytest.mark.parametrize("region", REGIONS)
def test_damage_while_the_store_is_open_is_found_at_the_load(
    open_store: OpenStore, folder: Path, region: str
) -> None:
    store = open_store()
    stored = reply(store, "ada", range(40))
    path = block_path(folder, stored[1].key)
    path.write_bytes(REGIONS[region](path.read_bytes()))
    error, _ = load(store, stored[1].key)
    assert isinstance(error, DamagedBlock)
    assert store.flush()
    assert store.stats().counts["damaged"] == 1
    assert store.stats().quarantine_nbytes > 0
    put_all(store, [stored[1]])
    assert store.flush()
    assert_loads(store, stored)


@pytest.mark.parametrize("place", [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("nbytes", [1, 512, 4096])
def test_damage_anywhere_in_the_catalog_never_gives_a_wrong_word(
    open_store: OpenStore, folder: Path, place: float, nbytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is set aside, or heals, or its agents are reported: whatever is told as history is the history."""
    store = open_store()
    links = reply(store, "ada", range(400))
    reply(store, "bob", [*range(100), *[7] * 300])
    store.close()
    path = folder / "catalog.sqlite"
    data = bytearray(path.read_bytes())
    start = int(place * len(data))
    data[start : start + nbytes] = (byte ^ 0xA5 for byte in data[start : start + nbytes])
    path.write_bytes(data)
    store = open_store()
    told = {agent.id.name for agent in store.agents()}
    broken = {agent.name for agent in store.verify().broken_agents}
    for name, tokens in (("ada", list(range(400))), ("bob", [*range(100), *[7] * 300])):
        if name in told - broken:
            assert store.history(agent_id(name)) == tokens
    if not told:
        assert store.stats().notes, "lost agents are not kept quiet about"
        assert "lost" in caplog.text
    again = reply(store, "ada", range(400))
    assert again == links
    assert_loads(store, links)
    assert store.history(agent_id("ada")) == list(range(400))
