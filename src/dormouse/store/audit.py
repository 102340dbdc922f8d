"""`verify`: every checksum and every key derived again, from the files and from the rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dormouse.domain.agents import AgentId
from dormouse.domain.blocks import BlockKey, Namespace
from dormouse.domain.errors import AgentNotFound, DamagedBlock, StoreError
from dormouse.store.files import BlockFormat, open_block, read_exactly
from dormouse.store.layout import Layout
from dormouse.store.plain_blocks import BlockCodec
from dormouse.store.rows import BlockRow
from dormouse.store.view import StoreView


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """`nbytes` of `num_blocks` files were read; `damaged` ones are in quarantine now.

    `broken_agents` have lost a part of their history.
    """

    num_blocks: int
    nbytes: int
    damaged: tuple[BlockKey, ...]
    broken_agents: tuple[AgentId, ...]

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not self.damaged and not self.broken_agents


def verify(
    layout: Layout,
    codec: BlockCodec,
    view: StoreView,
    formats: Mapping[Namespace, BlockFormat],
    on_damage: Callable[[BlockRow, Exception], None],
) -> VerifyReport:
    """Check every stored block and every agent's history. Reads all of it; runs on any thread.

    Blocks of namespaces that are not in `formats` are checked without knowing what their tensors are
    to be called.
    """
    nbytes = 0
    damaged = []
    num_blocks = 0
    for key in view.stored_keys():
        row = view.find(key)
        if not isinstance(row, BlockRow):
            continue
        error = _file_error(layout, codec, row, formats.get(row.namespace))
        if error is None:
            num_blocks += 1
            nbytes += row.nbytes
        elif view.find(key) is row:
            damaged.append(key)
            on_damage(row, error)
    broken = tuple(agent_id for agent_id in view.agent_ids() if not _is_whole(view, agent_id))
    return VerifyReport(num_blocks, nbytes, tuple(damaged), broken)


def _file_error(
    layout: Layout, codec: BlockCodec, row: BlockRow, block_format: BlockFormat | None
) -> Exception | None:
    try:
        fd = open_block(layout.block(row.namespace, row.key))
        try:
            header, tokens, _ = codec.payload(fd)
            head = bytearray(header.payload_start)
            read_exactly(fd, [head], 0)
            file_nbytes = os.fstat(fd).st_size
        finally:
            os.close(fd)
    except (DamagedBlock, OSError) as error:
        return error
    same = (header.key, header.namespace, header.parent, header.checksum, tokens, file_nbytes)
    if same != (row.key, row.namespace, row.parent, row.checksum, row.tokens, row.nbytes):
        return DamagedBlock("file and catalog differ")
    if block_format is not None and head != codec.head(row, block_format):
        return DamagedBlock("header differs from what it is to be")
    return None


def _is_whole(view: StoreView, id: AgentId) -> bool:
    try:
        view.history(id)
    except AgentNotFound:
        return True
    except StoreError:
        return False
    return True
