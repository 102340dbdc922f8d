"""An agent's file into the store: blocks batch by batch, then the agent in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, TypeVar

from dormouse.domain.agents import AgentId
from dormouse.domain.blocks import ROOT, BlockKey, Link, pack_tokens, packed_block_key, unpack_tokens
from dormouse.domain.errors import ArchiveInvalid, DormouseError
from dormouse.store.archive import Archive, Ref
from dormouse.store.files import BlockFormat, payload_checksum
from dormouse.store.keeper import Keeper
from dormouse.store.rows import (
    AgentRow,
    BlockRow,
    CheckpointId,
    CheckpointRow,
    DocumentId,
    checkpoint_document,
)
from dormouse.store.view import PendingBlock, StoreView

T = TypeVar("T")

BATCH_NBYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Adoption:
    """An agent to be entered: its row, the history that it needs, its checkpoints and documents."""

    agent: AgentRow
    history: tuple[BlockRow, ...]
    checkpoints: tuple[CheckpointRow, ...]
    bodies: dict[DocumentId, bytes] = field(default_factory=dict)


class AgentImport:
    """A verified file, under the names that it gets here. `now` is in Unix seconds."""

    def __init__(self, archive: Archive, id: AgentId, now: float) -> None:
        self._archive = archive
        self._id = id
        self._now = now
        self._format = BlockFormat(archive.manifest.identity.cache)
        self._links: list[Link] = []
        self._ends: list[int] = []
        """Tokens up to and with each block."""
        for node, packed in zip(archive.manifest.nodes, archive.tokens, strict=True):
            parent = ROOT if node.parent < 0 else self._links[node.parent].key
            key = packed_block_key(id.namespace, parent, packed)
            self._links.append(Link(key, parent, tuple(unpack_tokens(packed))))
            before = 0 if node.parent < 0 else self._ends[node.parent]
            self._ends.append(before + node.num_tokens)

    def batches(self, file: BinaryIO, view: StoreView) -> Iterator[list[PendingBlock]]:
        """The blocks that the store lacks, a few at a time. Raises ArchiveInvalid when the file changed."""
        block_nbytes = self._format.cache.block_nbytes
        offset = self._archive.payloads_at
        batch: list[PendingBlock] = []
        for node, packed, link in zip(
            self._archive.manifest.nodes, self._archive.tokens, self._links, strict=True
        ):
            if not node.checksum:
                continue
            if not view.has_durable(link.key):
                file.seek(offset)
                payload = file.read(block_nbytes)
                if payload_checksum(payload, packed) != node.checksum:
                    raise ArchiveInvalid("the file changed while it was imported")
                batch.append(PendingBlock(self._id.namespace, link, packed, payload, self._format, self._now))
            offset += block_nbytes
            if len(batch) * block_nbytes >= BATCH_NBYTES:
                yield batch
                batch = []
        if batch:
            yield batch

    def adoption(self) -> Adoption:
        """What is entered when the blocks are there."""
        manifest, here = self._archive.manifest, self._id
        tip, rest, num_tokens = self._state(manifest.ref)
        agent = AgentRow(
            here,
            manifest.model,
            tip,
            rest,
            num_tokens,
            created_at=self._now,
            used_at=self._now,
            pinned=False,
            parent=manifest.parent,
            parent_tokens=manifest.parent_tokens,
            quota_nbytes=manifest.quota_nbytes,
        )
        checkpoints = tuple(
            CheckpointRow(CheckpointId(here, tag.tag), *self._state(tag.ref), tag.created_at)
            for tag in manifest.tags
        )
        bodies = {}
        for document, body in zip(manifest.documents, self._archive.bodies, strict=True):
            if document.tag:
                bodies[checkpoint_document(here.tenant, here.name, document.tag)] = body
            else:
                bodies[DocumentId(here.tenant, document.kind, here.name)] = body
        return Adoption(agent, tuple(self._history()), checkpoints, bodies)

    def _history(self) -> Iterator[BlockRow]:
        for link, packed, end in zip(self._links, self._archive.tokens, self._ends, strict=True):
            start = end - len(link.tokens)
            yield BlockRow(link.key, self._id.namespace, link.parent, packed, start, 0, "", self._now)

    def _state(self, ref: Ref) -> tuple[BlockKey, bytes, int]:
        before = 0 if ref.tip < 0 else self._ends[ref.tip]
        tip = ROOT if ref.tip < 0 else self._links[ref.tip].key
        return tip, pack_tokens(ref.rest), before + len(ref.rest)


def import_blocks(
    keeper: Keeper,
    view: StoreView,
    run: Callable[[Callable[[], object]], object],
    agent: AgentImport,
    file: BinaryIO,
    finish: Callable[[], T],
) -> T:
    """Write the blocks, then `finish`, each as an action on the writer thread.

    An error on the way takes the blocks back that nobody else has come to need, and is raised.
    """
    written: list[BlockKey] = []
    try:
        for batch in agent.batches(file, view):
            written += [block.link.key for block in batch]
            run(partial(keeper.add, batch))
        results: list[T] = []
        run(lambda: results.append(finish()))
        return results[0]
    except BaseException:
        _take_back(keeper, run, written)
        raise


def _take_back(
    keeper: Keeper, run: Callable[[Callable[[], object]], object], written: Sequence[BlockKey]
) -> None:
    try:
        run(lambda: keeper.remove_unreached(written))
    except DormouseError:
        # They belong to nobody: `gc` or the quota removes them.
        return
