"""An agent out of the store, as the bytes of one file."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
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
from dormouse.store.files import open_block
from dormouse.store.identity import Identity
from dormouse.store.layout import Layout
from dormouse.store.plain_blocks import BlockCodec
from dormouse.store.rows import AgentRow, BlockRow, CheckpointRow
from dormouse.store.view import Snapshot

_DAMAGED = "a block is damaged; `dormouse store verify` sets it aside, then export again"


class AgentExport:
    """The file of one agent. `nbytes` is its size; the bytes are made while they are iterated over."""

    def __init__(
        self,
        layout: Layout,
        codec: BlockCodec,
        snapshot: Snapshot,
        identity: Identity,
        documents: Mapping[tuple[str, str], bytes],
    ) -> None:
        """`documents` are by kind and tag. Raises StoreError when a part of the history is lost."""
        self._layout = layout
        self._codec = codec
        ends = _ends(snapshot)
        _check_whole(snapshot, ends)
        # Parents before children.
        self._rows = sorted(snapshot.blocks.values(), key=lambda row: (ends[row.parent], row.key))
        self._bodies = list(documents.values())
        numbers = {row.key: number for number, row in enumerate(self._rows)} | {ROOT: -1}
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
            header, tokens, payload = self._codec.payload(fd)
        except DamagedBlock as error:
            raise DamagedBlock(_DAMAGED) from error
        finally:
            os.close(fd)
        if (tokens, header.checksum) != (row.tokens, row.checksum):
            raise DamagedBlock(_DAMAGED)
        return bytes(payload)


def _ends(snapshot: Snapshot) -> dict[BlockKey, int]:
    """Tokens up to and with each block that goes back to ROOT without a gap. Counted anew: a row whose
    parent came after it does not know how many tokens are before it."""
    children: defaultdict[BlockKey, list[BlockRow]] = defaultdict(list)
    for row in snapshot.blocks.values():
        children[row.parent].append(row)
    ends = {ROOT: 0}
    waiting = [ROOT]
    while waiting:
        parent = waiting.pop()
        for row in children[parent]:
            ends[row.key] = ends[parent] + row.num_tokens
            waiting.append(row.key)
    return ends


def _check_whole(snapshot: Snapshot, ends: Mapping[BlockKey, int]) -> None:
    refs: tuple[AgentRow | CheckpointRow, ...] = (snapshot.agent, *snapshot.checkpoints)
    whole = snapshot.blocks.keys() <= ends.keys() and all(
        ref.tip in ends and ends[ref.tip] + len(unpack_tokens(ref.rest)) == ref.num_tokens for ref in refs
    )
    if not whole:
        raise StoreError(
            f"a part of the history of {snapshot.agent.id.name!r} is lost; it cannot be exported"
        )


def _ref(row: AgentRow | CheckpointRow, numbers: Mapping[BlockKey, int]) -> Ref:
    return Ref(numbers[row.tip], tuple(unpack_tokens(row.rest)))
