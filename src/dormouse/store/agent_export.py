"""An agent out of the store, as the bytes of one file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping

from dormouse.domain.blocks import ROOT, BlockKey, unpack_tokens
from dormouse.domain.errors import DamagedBlock, StoreError
from dormouse.store.archive import (
    DIGEST_NBYTES,
    ArchivedDocument,
    ArchivedTag,
    Manifest,
    Node,
    Ref,
)
from dormouse.store.files import open_block, payload_checksum, read_exactly, read_header
from dormouse.store.identity import Identity
from dormouse.store.layout import Layout
from dormouse.store.rows import AgentRow, BlockRow, CheckpointRow
from dormouse.store.view import Snapshot


class AgentExport:
    """The file of one agent. `nbytes` is its size; the bytes are made while they are iterated over."""

    def __init__(
        self,
        layout: Layout,
        snapshot: Snapshot,
        identity: Identity,
        documents: Mapping[tuple[str, str], bytes],
    ) -> None:
        """`documents` are by kind and tag. Raises StoreError when a part of the history is lost."""
        self._layout = layout
        self._rows = _in_order(snapshot)
        self._bodies = list(documents.values())
        numbers = {row.key: number for number, row in enumerate(self._rows)} | {ROOT: -1}
        _check_whole(snapshot, numbers)
        agent = snapshot.agent
        self._head = Manifest(
            name=agent.id.name,
            model=agent.model,
            identity=identity,
            ref=_ref(agent, numbers),
            nodes=tuple(Node(numbers[row.parent], row.num_tokens, row.checksum) for row in self._rows),
            tags=tuple(ArchivedTag(c.id.tag, _ref(c, numbers), c.created_at) for c in snapshot.checkpoints),
            documents=tuple(ArchivedDocument(*name, len(body)) for name, body in documents.items()),
            quota_nbytes=agent.quota_nbytes,
            parent=agent.parent,
            parent_tokens=agent.parent_tokens,
        )
        self.nbytes = len(self._head.header()) + sum(self._head.sizes())

    def __iter__(self) -> Iterator[bytes]:
        """The file in order. Raises StoreError and OSError when a block has gone meanwhile."""
        digest = hashlib.blake2b(digest_size=DIGEST_NBYTES)
        for part in self._parts():
            digest.update(part)
            yield part
        yield digest.digest()

    def _parts(self) -> Iterator[bytes]:
        yield self._head.header()
        yield b"".join(row.tokens for row in self._rows)
        yield from self._bodies
        for row in self._rows:
            if row.nbytes:
                yield self._payload(row)

    def _payload(self, row: BlockRow) -> bytes:
        try:
            fd = open_block(self._layout.block(row.namespace, row.key))
        except FileNotFoundError as error:
            raise StoreError("a block was evicted while its agent was exported; export it again") from error
        try:
            header, tokens = read_header(fd)
            payload = bytearray(header.payload_nbytes)
            read_exactly(fd, [payload], header.payload_start)
        finally:
            os.close(fd)
        if tokens != row.tokens or payload_checksum(memoryview(payload), tokens) != row.checksum:
            raise DamagedBlock("a block is damaged; `dormouse store verify` sets it aside, then export again")
        return bytes(payload)


def _in_order(snapshot: Snapshot) -> list[BlockRow]:
    """The blocks, parents before children."""
    return sorted(snapshot.blocks.values(), key=lambda row: (row.num_before, row.key))


def _check_whole(snapshot: Snapshot, numbers: Mapping[BlockKey, int]) -> None:
    refs: tuple[AgentRow | CheckpointRow, ...] = (snapshot.agent, *snapshot.checkpoints)
    whole = all(row.parent in numbers for row in snapshot.blocks.values())
    for ref in refs:
        row = snapshot.blocks.get(ref.tip)
        length = (row.end if row is not None else 0) + len(unpack_tokens(ref.rest))
        whole = whole and ref.tip in numbers and length == ref.num_tokens
    if not whole:
        raise StoreError(
            f"a part of the history of {snapshot.agent.id.name!r} is lost; it cannot be exported"
        )


def _ref(row: AgentRow | CheckpointRow, numbers: Mapping[BlockKey, int]) -> Ref:
    return Ref(numbers[row.tip], tuple(unpack_tokens(row.rest)))
