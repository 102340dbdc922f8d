"""Block files: bytes, alignment, and headers that nobody should trust."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from tests.store.kit import CACHE, NAMESPACE, links_of, payload_of

from dormouse.domain.blocks import ROOT, block_key, chain_links, namespace_of, pack_tokens
from dormouse.domain.cache_spec import CacheSpec, KVFormat
from dormouse.domain.errors import DamagedBlock
from dormouse.store.files import (
    LENGTH_NBYTES,
    MAX_HEADER_NBYTES,
    BlockFormat,
    BlockHeader,
    parse_header,
    payload_checksum,
    read_header,
    verify_payload,
)


def file_of(cache: CacheSpec = CACHE, num_tokens: int = 16) -> bytes:
    tokens = pack_tokens(range(num_tokens))
    key = block_key(NAMESPACE, ROOT, range(num_tokens))
    payload = (bytes(range(256)) * (cache.block_nbytes // 256 + 1))[: cache.block_nbytes]
    checksum = payload_checksum(payload, tokens)
    return BlockFormat(cache).header(NAMESPACE, key, ROOT, tokens, checksum) + payload + tokens


def read_back(path: Path) -> BlockHeader:
    fd = os.open(path, os.O_RDONLY)
    try:
        header, tokens = read_header(fd)
        verify_payload(fd, header, tokens)
        return header
    finally:
        os.close(fd)


@pytest.mark.parametrize("format", KVFormat)
@pytest.mark.parametrize("num_layers", [1, 3, 60])
def test_any_safetensors_reader_opens_one(format: KVFormat, num_layers: int) -> None:
    cache = CacheSpec.for_heads(
        format, 32, num_layers=num_layers, num_kv_heads=3, k_head_dim=96, v_head_dim=32
    )
    data = file_of(cache, num_tokens=9)
    header_nbytes = LENGTH_NBYTES + int.from_bytes(data[:8], "little")
    assert header_nbytes % 4096 == 0
    assert len(data) <= BlockFormat(cache).file_nbytes(pack_tokens(range(9)))
    tensors: dict[str, dict[str, Any]] = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    assert [*tensors] != []
    assert set(tensors) == {section.name for section in cache.sections} | {"tokens"}
    payload = data[header_nbytes:]
    for section in cache.sections:
        tensor = tensors[section.name]
        assert (tensor["dtype"], tuple(tensor["shape"])) == (section.dtype, section.shape)
        assert bytes(tensor["data"]) == payload[section.offset : section.offset + section.nbytes]
    assert np.frombuffer(tensors["tokens"]["data"], "<u4").tolist() == list(range(9))


def test_metadata_is_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "block.safetensors"
    path.write_bytes(file_of())
    with safetensors.safe_open(path, framework="np") as opened:
        metadata = opened.metadata()
    assert metadata["namespace"] == NAMESPACE.hex()
    assert (metadata["format"], metadata["parent"], metadata["num_tokens"]) == ("1", "", "16")
    assert metadata["cache"] == CACHE.fingerprint()
    read_back(path)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, 4096, -65, -1])
def test_a_truncated_file_is_damaged(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "block.safetensors"
    path.write_bytes(file_of()[:cut])
    with pytest.raises(DamagedBlock):
        read_back(path)


@given(position=st.integers(0, len(file_of()) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_changes_nothing_unseen(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    data = bytearray(file_of())
    data[position] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(data)
    try:
        found = read_back(path)
    except DamagedBlock:
        return
    # Without the cache only names and white space can change unseen; a load compares those as well.
    assert 8 <= position < 4096
    assert replace(found, cache="") == replace(parse_header(file_of()[8:4096], len(data)), cache="")


@given(st.binary(max_size=300))
def test_no_bytes_but_a_header_are_a_header(text: bytes) -> None:
    with pytest.raises(DamagedBlock):
        parse_header(text, 1000)


def table_of() -> dict[str, Any]:
    data = file_of()
    table: dict[str, Any] = json.loads(data[8:4096])
    return table


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        for name in path[:-1]:
            table = table[name]
        table[path[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("__metadata__", "format", to="2"),
        _set("__metadata__", "format", to=1),
        _set("__metadata__", "key", to="AB" * 32),
        _set("__metadata__", "key", to="zz"),
        _set("__metadata__", "namespace", to="00"),
        _set("__metadata__", "num_tokens", to="15"),
        _set("__metadata__", "more", to="x"),
        _set("__metadata__", to=None),
        _set("tokens", "dtype", to="I32"),
        _set("tokens", "shape", to=[4, 4]),
        _set("tokens", "shape", to=[-16]),
        _set("tokens", "shape", to=[True]),
        _set("tokens", "data_offsets", to=[3584, 3648, 1]),
        _set("tokens", "data_offsets", to=[3600, 3664]),
        _set("layers.0.k.data", "data_offsets", to=[4, 1028]),
        _set("layers.0.k.data", "dtype", to="F64"),
        _set("layers.0.k.data", "more", to=1),
        _set("layers.0.k.data", to=[]),
        _set("another", to={"dtype": "U8", "shape": [0], "data_offsets": [5000, 5000]}),
        lambda table: table.pop("tokens"),
        lambda table: table.pop("layers.0.k.data"),
    ],
)
def test_a_header_that_lies_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    table = table_of()
    change(table)
    with pytest.raises(DamagedBlock):
        parse_header(json.dumps(table).encode().ljust(4088), len(file_of()))


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":NaN}', b'{"a":1,"a":1}', b"\xff", b"[]", b"null"])
def test_hostile_json_is_refused(text: bytes) -> None:
    with pytest.raises(DamagedBlock):
        parse_header(text.ljust(4088), 8192)


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes((MAX_HEADER_NBYTES + 1).to_bytes(8, "little"))
    os.truncate(path, 1 << 40)
    with pytest.raises(DamagedBlock, match="header of"):
        read_back(path)


def test_the_unchanged_header_is_parsed() -> None:
    data = file_of()
    header = parse_header(data[8:4096], len(data))
    assert header.key == next(iter(chain_links(NAMESPACE, range(16), 16))).key
    assert (header.payload_start, header.payload_nbytes) == (4096, CACHE.block_nbytes)


def test_kit_payloads_differ() -> None:
    first, second = links_of(range(32))
    assert payload_of(first.key) != payload_of(second.key)
    assert namespace_of("a") != NAMESPACE
