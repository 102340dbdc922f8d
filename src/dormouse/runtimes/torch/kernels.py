"""The seam of the kernels: those that touch the arena, and those that work row by row.

Everything that depends on the KV format lies behind `Kernels`. The reference runs on every device; `native`
replaces it on CPUs whose build has the compiled module (see `selection`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

ROW_TILE = 16
"""Groups are padded to whole tiles of rows: fewer would not be row invariant in fp32 products."""


@dataclass(frozen=True)
class RowGroup:
    """Chunks of about as many rows each, so that one padded batch holds them.

    `chunks` `[m]` are their indices, `rows` `[m, padded]` the flat row of each padded one (padding
    repeats the chunk's first row) and `is_row` which are real; `positions` `[m, padded]`, `ends` `[m]`.
    `first_position` and `num_keys` bound all of them.
    """

    chunks: Tensor
    rows: Tensor
    is_row: Tensor
    positions: Tensor
    ends: Tensor
    first_position: int
    num_keys: int


@dataclass(frozen=True)
class AttentionBatch:
    """Which rows of a step belong to which sequence, and where that sequence's past lies.

    Rows `row_offsets[i]:row_offsets[i + 1]` (int32 `[n + 1]`) are chunk i, at positions from `starts[i]`
    (int32 `[n]`). `page_table` int32 `[n, max_pages]` is each chunk's block table, padded with 0.
    """

    row_offsets: Tensor
    starts: Tensor
    page_table: Tensor

    @cached_property
    def groups(self) -> tuple[RowGroup, ...]:
        """The chunks by padded number of rows; computed once per step, for kernels that work on batches."""
        offsets, starts = self.row_offsets.long(), self.starts.long()
        lengths = offsets.diff()
        padded = (lengths + ROW_TILE - 1) // ROW_TILE * ROW_TILE
        return tuple(
            _row_group((padded == size).nonzero()[:, 0], size, offsets[:-1], lengths, starts)
            for size in sorted(set(padded.tolist()))
        )


def _row_group(chunks: Tensor, size: int, offsets: Tensor, lengths: Tensor, starts: Tensor) -> RowGroup:
    steps = torch.arange(size, device=chunks.device)
    is_row = steps < lengths[chunks, None]
    steps = steps * is_row
    first, ends = starts[chunks], starts[chunks] + lengths[chunks]
    return RowGroup(
        chunks=chunks,
        rows=offsets[chunks, None] + steps,
        is_row=is_row,
        positions=first[:, None] + steps,
        ends=ends,
        first_position=int(first.min()),
        num_keys=int(ends.max()),
    )


class Kernels(Protocol):
    """Kernels for one cache spec. `arena` is `[num_pages, block_nbytes]` uint8, as `Arena.memory`."""

    def write_kv(self, arena: Tensor, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store `k` `[rows, kv_heads, k_head_dim]` and `v` `[rows, kv_heads, v_head_dim]` in the format.

        Row r goes to row `slots[r] % block_size` of page `slots[r] // block_size`; `slots` is int64.
        """

    def attend(
        self, arena: Tensor, layer: int, q: Tensor, batch: AttentionBatch, scale: float, window: int | None
    ) -> Tensor:
        """Causal attention of `q` `[rows, heads, k_head_dim]` to what the arena holds.

        Consecutive heads share a KV head. A token sees itself and what was before it, with `window` only
        itself and the `window - 1` tokens before it. Gives `[rows, heads, v_head_dim]` in the dtype of `q`,
        to which stored values are rounded before use. Row invariant.
        """


class RowOps(Protocol):
    """What is computed row by row between the matrix products; fp32 inside, rounded once, row invariant.

    The module `row_ops` is one, the module `native` another.
    """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, add_one: bool = False) -> Tensor:
        """RMS norm of the rows of `[rows, dim]`; `add_one` where weights are stored less one."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, add_one: bool = False
    ) -> Tensor:
        """Add `x` to `residual` in place and return the norm of the sum, which is rounded first."""

    def rope_(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        """Rotate the halves of each head of `[rows, heads, dim]` in place; tables as in `RopeTable`."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` of `[rows, 2 * n]`, gate first."""

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        """`gelu(gate) * up` of `[rows, 2 * n]`, gate first, with the tanh approximation."""
