"""Block files as they are, and what any kind of them can do."""

from __future__ import annotations

import os
from typing import Protocol

from dormouse.domain.blocks import BlockKey, Namespace
from dormouse.domain.errors import DamagedBlock
from dormouse.store.files import (
    BlockFormat,
    BlockHeader,
    payload_checksum,
    read_exactly,
    read_header,
    verify_payload,
)
from dormouse.store.rows import BlockRow


class BlockCodec(Protocol):
    """How blocks lie in files: plain, or sealed. Methods that read raise DamagedBlock and OSError."""

    def parts(
        self,
        block_format: BlockFormat,
        namespace: Namespace,
        key: BlockKey,
        parent: BlockKey,
        tokens: bytes,
        payload: bytes,
        checksum: str,
    ) -> tuple[bytes, ...]:
        """The bytes of a block's file. `checksum` is that of payload and `tokens`, which are packed."""

    def load(self, fd: int, row: BlockRow, block_format: BlockFormat, into: memoryview) -> None:
        """Fill `into` with the payload of the block that is `row`, verified."""

    def identify(self, fd: int) -> tuple[BlockHeader, bytes]:
        """What a file says of itself, and its packed tokens. The key is derived, the payload not read."""

    def payload(self, fd: int) -> tuple[BlockHeader, bytes, bytearray]:
        """As `identify`, and the payload, verified."""

    def head(self, row: BlockRow, block_format: BlockFormat) -> bytes:
        """What the file of a block begins with."""


class PlainBlocks:
    """See `files`. The checksum says whether a payload is whole."""

    def parts(
        self,
        block_format: BlockFormat,
        namespace: Namespace,
        key: BlockKey,
        parent: BlockKey,
        tokens: bytes,
        payload: bytes,
        checksum: str,
    ) -> tuple[bytes, ...]:
        """See `BlockCodec`."""
        return block_format.header(namespace, key, parent, tokens, checksum), payload, tokens

    def load(self, fd: int, row: BlockRow, block_format: BlockFormat, into: memoryview) -> None:
        """See `BlockCodec`."""
        header = self.head(row, block_format)
        found_header, found_tokens = bytearray(len(header)), bytearray(len(row.tokens))
        if os.fstat(fd).st_size != row.nbytes:
            raise DamagedBlock("size differs from the catalog's")
        read_exactly(fd, [found_header, into, found_tokens], 0)
        # The key of `row` follows from its parent and tokens, so equal tokens prove the key.
        if found_header != header or found_tokens != row.tokens:
            raise DamagedBlock("header or tokens differ from the catalog's")
        if payload_checksum(into, row.tokens) != row.checksum:
            raise DamagedBlock("checksum does not match")

    def identify(self, fd: int) -> tuple[BlockHeader, bytes]:
        """See `BlockCodec`."""
        return read_header(fd)

    def payload(self, fd: int) -> tuple[BlockHeader, bytes, bytearray]:
        """See `BlockCodec`."""
        header, tokens = read_header(fd)
        return header, tokens, verify_payload(fd, header, tokens)

    def head(self, row: BlockRow, block_format: BlockFormat) -> bytes:
        """See `BlockCodec`."""
        return block_format.header(row.namespace, row.key, row.parent, row.tokens, row.checksum)
