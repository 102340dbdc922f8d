"""Files of the data folder and agents' files, damaged in every way: a typed error, or what was written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from tests.security.mutations import damaged, fuzzing, twisted
from tests.store.kit import CACHE, NAMESPACE, QUOTA, block_path, links_of, ram_folder, reply

from dormouse.domain.blocks import namespace_of
from dormouse.domain.errors import (
    ArchiveInvalid,
    ArchiveMismatch,
    DamagedBlock,
    DormouseError,
    InvalidRequest,
)
from dormouse.store.archive import Archive, read_archive
from dormouse.store.block_store import BlockStore
from dormouse.store.files import open_block, read_header, verify_payload
from dormouse.store.identity import Identity

TALK = list(range(100, 140))
HERE = namespace_of("toy model", CACHE.fingerprint(), "acme")
LITTLE_NBYTES = 32 << 20


@pytest.fixture(scope="module")
def files() -> Iterator[tuple[bytes, bytes]]:
    """A block file, and an agent's file with checkpoints and documents."""
    with ram_folder() as place, BlockStore.open(place / "data", quota_nbytes=QUOTA) as store:
        store.register(NAMESPACE, CACHE)
        store.register(HERE, CACHE, "toy model")
        reply(store, "ada", TALK, rest=[1, 2])
        store.notebook.put("acme", "agent", "ada", b'{"system": "be brief"}')
        store.admin.tag("acme", "ada", "then")
        store.notebook.put("acme", "transcript", "ada", b'{"messages": []}')
        store.flush()
        block = block_path(place / "data", links_of(TALK)[0].key).read_bytes()
        yield block, b"".join(store.admin.export("acme", "ada"))


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with ram_folder() as place:
        yield place / "file"


def read_block(path: Path) -> str:
    """What reconciliation and verify do with a file that they do not know."""
    fd = open_block(path)
    try:
        header, tokens = read_header(fd)
        verify_payload(fd, header, tokens)
    finally:
        os.close(fd)
    return header.checksum


def test_fuzz_block_files(files: tuple[bytes, bytes], scratch: Path) -> None:
    block, _ = files
    scratch.write_bytes(block)
    good = read_block(scratch)

    @fuzzing(150)
    @given(body=damaged(block, hot=4096))
    def check(body: bytes) -> None:
        scratch.write_bytes(body)
        try:
            found = read_block(scratch)
        except DamagedBlock:
            return
        # Only spaces of the padding may differ, or a file that says what it said.
        assert found == good

    check()


def test_fuzz_agents_files(files: tuple[bytes, bytes]) -> None:
    _, archive = files
    good = read(archive)
    tracemalloc.start()

    @fuzzing(60)
    @given(body=damaged(archive, hot=2048))
    def check(body: bytes) -> None:
        before, _ = tracemalloc.get_traced_memory()  # hypothesis keeps what it has drawn
        tracemalloc.reset_peak()
        with contextlib.suppress(ArchiveInvalid, ArchiveMismatch):
            assert read(body) == good
        assert tracemalloc.get_traced_memory()[1] - before < LITTLE_NBYTES

    try:
        check()
    finally:
        tracemalloc.stop()


def test_fuzz_the_manifest_of_agents_files(files: tuple[bytes, bytes]) -> None:
    """A header that is JSON, and says strange things of sizes, parents, counts and names."""
    _, archive = files
    length = int.from_bytes(archive[:8], "little")
    table = json.loads(archive[8 : 8 + length])
    manifest = json.loads(table["__metadata__"]["manifest"])

    @fuzzing(150)
    @given(fields=twisted(manifest))
    def check(fields: Any) -> None:
        metadata = table["__metadata__"] | {"manifest": json.dumps(fields)}
        head = json.dumps(table | {"__metadata__": metadata}).encode()
        head = head.ljust(-(-(len(head) + 8) // 8) * 8 - 8)
        try:
            read(len(head).to_bytes(8, "little") + head + archive[8 + length :])
        except (ArchiveInvalid, ArchiveMismatch):
            return

    check()


def test_many_checkpoints_are_refused_before_they_cost_anything(files: tuple[bytes, bytes]) -> None:
    """Each of 300 checkpoints of a long chain once took a walk along the chain."""
    _, archive = files
    length = int.from_bytes(archive[:8], "little")
    table = json.loads(archive[8 : 8 + length])
    manifest = json.loads(table["__metadata__"]["manifest"])
    manifest["checkpoints"] = [[f"t{n}", 0, [], 1.0] for n in range(300)]
    table["__metadata__"]["manifest"] = json.dumps(manifest)
    head = json.dumps(table).encode()
    head = head.ljust(-(-(len(head) + 8) // 8) * 8 - 8)
    with pytest.raises(ArchiveInvalid, match="300 checkpoints"):
        read(len(head).to_bytes(8, "little") + head + archive[8 + length :])


def read(body: bytes) -> Archive:
    return read_archive(io.BytesIO(body), len(body), 1 << 20, Identity("toy model", CACHE))


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "..", "a\x00b", "x" * 300, "blocks/../../x"])
def test_names_in_agents_files_never_become_paths(
    files: tuple[bytes, bytes], tmp_path: Path, name: str
) -> None:
    _, archive = files
    with BlockStore.open(tmp_path / "in" / "data", quota_nbytes=QUOTA) as store:
        try:
            store.admin.load(io.BytesIO(archive), len(archive), "home", name=name)
        except InvalidRequest:
            assert store.agents() == []
        else:
            assert store.agent("home", name).num_tokens == len(TALK) + 2
            store.admin.tag("home", name, "t")
            assert b"".join(store.admin.export("home", name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["data"]


def test_fuzz_a_data_folder_that_somebody_wrote_into(files: tuple[bytes, bytes]) -> None:
    """Block files in their places with strange content: the store opens, and offers none of it."""
    block, _ = files

    @fuzzing(12)
    @given(bodies=damaged(block, hot=3000))
    def check(bodies: bytes) -> None:
        with ram_folder() as place:
            folder = place / "data"
            target = block_path(folder, links_of(TALK)[0].key)
            target.parent.mkdir(parents=True)
            target.write_bytes(bodies)
            (target.parent / "link.safetensors").symlink_to("/etc/passwd")
            with BlockStore.open(folder, quota_nbytes=QUOTA) as store:
                store.check()
                assert store.verify().is_clean or bodies != block

    try:
        check()
    except DormouseError as error:
        raise AssertionError("the store must open") from error
