"""Block files: safetensors whose payload is a page's bytes, aligned so that a page is read in place.

    8 bytes             length n of the header, little-endian
    n bytes             header: JSON, padded with spaces until 8 + n is a multiple of 4096
    block_nbytes        payload: the tensors of `CacheSpec.sections`, in order
    4 * num_tokens      tensor `tokens`, U32

A header is a function of the cache, the block and the checksum, so a known block's header is compared;
only files that the catalog does not know are parsed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from dormouse.domain.blocks import KEY_NBYTES, NAMESPACE_NBYTES, BlockKey, Namespace, packed_block_key
from dormouse.domain.cache_spec import DTYPE_NBYTES, CacheSpec
from dormouse.domain.errors import DamagedBlock, SealedBlock

FORMAT_VERSION = "1"
SEALED_FORMAT = "sealed-1"
"""Of encrypted block files; see `sealed_blocks`."""
SEAL_ROOM_NBYTES = 256
"""More than sealing adds to a file."""
PAYLOAD_ALIGNMENT = 4096
LENGTH_NBYTES = 8
MAX_HEADER_NBYTES = 1 << 20
METADATA_ROOM_NBYTES = 1024
"""More than metadata and the entry of `tokens` ever take."""
MAX_DIMENSION = 1 << 40
TOKEN_NBYTES = 4
METADATA_KEYS = {"format", "namespace", "key", "parent", "num_tokens", "cache", "checksum"}


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What a block file says of itself. `payload_start` and `payload_nbytes` are in bytes."""

    namespace: Namespace
    key: BlockKey
    parent: BlockKey
    num_tokens: int
    cache: str
    checksum: str
    payload_start: int
    payload_nbytes: int


class BlockFormat:
    """Writes the headers of one cache's blocks; the tensor table is rendered once."""

    def __init__(self, cache: CacheSpec) -> None:
        self.cache = cache
        self._tensors = ",".join(
            tensor_entry(s.name, s.dtype, s.shape, s.offset, s.offset + s.nbytes) for s in cache.sections
        )

    def header(
        self, namespace: Namespace, key: BlockKey, parent: BlockKey, tokens: bytes, checksum: str
    ) -> bytes:
        """The bytes before the payload. `tokens` are packed."""
        num_tokens = len(tokens) // TOKEN_NBYTES
        metadata = {
            "format": FORMAT_VERSION,
            "namespace": namespace.hex(),
            "key": key.hex(),
            "parent": parent.hex(),
            "num_tokens": str(num_tokens),
            "cache": self.cache.fingerprint(),
            "checksum": checksum,
        }
        start = self.cache.block_nbytes
        tail = tensor_entry("tokens", "U32", (num_tokens,), start, start + len(tokens))
        return pad_header(f'{{"__metadata__":{json.dumps(metadata)},{self._tensors},{tail}}}'.encode())

    def file_nbytes(self, tokens: bytes) -> int:
        """Size of the file of a block with these packed tokens, at most."""
        longest = LENGTH_NBYTES + len(self._tensors) + METADATA_ROOM_NBYTES
        return _aligned(longest) + self.cache.block_nbytes + len(tokens) + SEAL_ROOM_NBYTES


def payload_checksum(payload: bytes | memoryview, tokens: bytes | bytearray) -> str:
    """xxh3_128 over payload and packed tokens, in hex."""
    digest = xxhash.xxh3_128(payload)
    digest.update(tokens)
    return digest.hexdigest()


def read_exactly(fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> None:
    """Fill all of `buffers` from `offset` on. Raises DamagedBlock when the file ends before."""
    views = [memoryview(buffer) for buffer in buffers if len(buffer)]
    while views:
        num_read = os.preadv(fd, views, offset)
        if num_read == 0:
            raise DamagedBlock(f"file ends at byte {offset}, before its data")
        offset += num_read
        while views and num_read >= len(views[0]):
            num_read -= len(views.pop(0))
        if num_read:
            views[0] = views[0][num_read:]


def open_block(path: Path) -> int:
    """A descriptor to read a block file; links are not followed. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def read_header(fd: int) -> tuple[BlockHeader, bytes]:
    """The header of an open file and its packed tokens; the payload is not read.

    Everything but the payload is validated, the key derived again. Raises DamagedBlock and OSError.
    """
    file_nbytes = os.fstat(fd).st_size
    length = bytearray(LENGTH_NBYTES)
    read_exactly(fd, [length], 0)
    header_nbytes = int.from_bytes(length, "little")
    payload_start = LENGTH_NBYTES + header_nbytes
    if header_nbytes > MAX_HEADER_NBYTES or payload_start > file_nbytes:
        _damaged(f"header of {header_nbytes} bytes in a file of {file_nbytes}")
    text = bytearray(header_nbytes)
    read_exactly(fd, [text], LENGTH_NBYTES)
    header = parse_header(bytes(text), file_nbytes)
    tokens = bytearray(header.num_tokens * TOKEN_NBYTES)
    read_exactly(fd, [tokens], payload_start + header.payload_nbytes)
    packed = bytes(tokens)
    if packed_block_key(header.namespace, header.parent, packed) != header.key:
        _damaged("key does not follow from parent and tokens")
    return header, packed


def verify_payload(fd: int, header: BlockHeader, tokens: bytes) -> bytearray:
    """The payload, whose checksum matches. Raises DamagedBlock and OSError."""
    payload = bytearray(header.payload_nbytes)
    read_exactly(fd, [payload], header.payload_start)
    if payload_checksum(memoryview(payload), tokens) != header.checksum:
        _damaged("checksum does not match")
    return payload


def parse_header(text: bytes, file_nbytes: int) -> BlockHeader:
    """Validate the JSON of a header against the size of its file. Raises DamagedBlock."""
    try:
        table = json.loads(text.decode("ascii"), object_pairs_hook=_unique, parse_constant=_damaged)
    except (ValueError, RecursionError):
        _damaged("header is not JSON")
    metadata = table.pop("__metadata__", None) if isinstance(table, dict) else None
    if isinstance(metadata, dict) and metadata.get("format") == SEALED_FORMAT:
        raise SealedBlock(
            "it is encrypted, and this store is not; export and import move agents between them"
        )
    if not isinstance(metadata, dict) or set(metadata) != METADATA_KEYS:
        _damaged("header has no metadata of ours")
    if not all(isinstance(value, str) for value in metadata.values()):
        _damaged("metadata is not text")
    payload_start = LENGTH_NBYTES + len(text)
    payload_nbytes, num_tokens = _check_tensors(table, file_nbytes - payload_start)
    if metadata["format"] != FORMAT_VERSION:
        _damaged(f"format {metadata['format']!r} is not {FORMAT_VERSION!r}")
    if metadata["num_tokens"] != str(num_tokens):
        _damaged("token counts differ")
    if payload_start % PAYLOAD_ALIGNMENT:
        _damaged(f"payload starts at {payload_start}")
    return BlockHeader(
        Namespace(_hex(metadata["namespace"], NAMESPACE_NBYTES)),
        BlockKey(_hex(metadata["key"], KEY_NBYTES)),
        BlockKey(_hex(metadata["parent"], KEY_NBYTES) if metadata["parent"] else b""),
        num_tokens,
        metadata["cache"],
        metadata["checksum"],
        payload_start,
        payload_nbytes,
    )


def _check_tensors(table: dict[str, Any], data_nbytes: int) -> tuple[int, int]:
    """Payload bytes and token count, given that the tensors fill `data_nbytes` without a hole."""
    spans = sorted(_span(name, entry) for name, entry in table.items())
    if not spans or "tokens" not in table or spans[-1][2] != "tokens":
        _damaged("tensor `tokens` is not the last")
    if spans[0][0] != 0 or spans[-1][1] != data_nbytes:
        _damaged(f"tensors do not fill the {data_nbytes} bytes after the header")
    if any(left[1] != right[0] for left, right in pairwise(spans)):
        _damaged("tensors overlap or leave a hole")
    tokens = table["tokens"]
    if tokens["dtype"] != "U32" or len(tokens["shape"]) != 1 or tokens["shape"][0] == 0:
        _damaged("tensor `tokens` is no list of U32")
    return spans[-1][0], tokens["shape"][0]


def _span(name: str, entry: object) -> tuple[int, int, str]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _damaged(f"tensor {name!r} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        _damaged(f"tensor {name!r} has a malformed shape or place")
    nbytes = DTYPE_NBYTES.get(dtype) if isinstance(dtype, str) else None
    if nbytes is None or prod(shape) * nbytes != offsets[1] - offsets[0]:
        _damaged(f"tensor {name!r} does not have the size of its shape")
    return offsets[0], offsets[1], name


def _sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < MAX_DIMENSION for v in values)


def _hex(text: str, nbytes: int) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        _damaged(f"{text!r} is not hexadecimal")
    if value.hex() != text or len(value) != nbytes:
        _damaged(f"{text!r} is not {nbytes} bytes in hexadecimal")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        _damaged("header names a tensor twice")
    return table


def _aligned(nbytes: int) -> int:
    return -(-nbytes // PAYLOAD_ALIGNMENT) * PAYLOAD_ALIGNMENT


def pad_header(text: bytes) -> bytes:
    """The bytes before a payload, for a header that says `text`."""
    length = _aligned(LENGTH_NBYTES + len(text)) - LENGTH_NBYTES
    return length.to_bytes(LENGTH_NBYTES, "little") + text.ljust(length)


def tensor_entry(name: str, dtype: str, shape: tuple[int, ...], start: int, end: int) -> str:
    """One tensor in a header's JSON. `start` and `end` are in bytes from the payload's start."""
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return f"{json.dumps(name)}:{json.dumps(entry)}"


def _damaged(what: str) -> NoReturn:
    raise DamagedBlock(what)
