"""A plan as tensors: one flat row per token of the step, built once and shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from dormouse.domain.plan import Plan
from dormouse.runtimes.torch.kernels import AttentionBatch


@dataclass(frozen=True, slots=True)
class Step:
    """`token_ids`, `positions` and `slots` are int64 `[rows]`; `slots` as in `Kernels.write_kv`.

    `logit_rows` are the rows whose logits are wanted, int64 `[wanted]`, and `logit_attention` is the
    batch of these rows alone: behind the last layer's K and V no other row is of use.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    logit_rows: Tensor
    attention: AttentionBatch
    logit_attention: AttentionBatch

    @classmethod
    def from_plan(cls, plan: Plan, block_size: int, device: torch.device) -> Step:
        """Lay out the chunks of a plan that is not empty one after the other."""
        chunks = plan.chunks
        lengths = np.array([len(chunk.tokens) for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
        offsets = np.concatenate(([0], lengths.cumsum())).astype(np.int32)
        num_rows = int(offsets[-1])
        page_table = np.zeros((len(chunks), max(len(chunk.pages) for chunk in chunks)), dtype=np.int32)
        for row, chunk in zip(page_table, chunks, strict=True):
            row[: len(chunk.pages)] = chunk.pages
        owners = np.repeat(np.arange(len(chunks)), lengths)
        positions = np.arange(num_rows) + np.repeat(starts - offsets[:-1], lengths)
        pages = page_table[owners, positions // block_size].astype(np.int64)
        tokens = chain.from_iterable(chunk.tokens for chunk in chunks)
        num_logits = np.array([chunk.num_logits for chunk in chunks])
        wanting = num_logits > 0
        ends = zip(offsets[1:].tolist(), num_logits.tolist(), strict=True)
        wanted = [row for end, count in ends for row in range(end - count, end)]
        logit_starts = (starts + lengths - num_logits).astype(np.int32)[wanting]
        logit_offsets = np.concatenate(([0], num_logits[wanting].cumsum())).astype(np.int32)

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            token_ids=on_device(np.fromiter(tokens, np.int64, num_rows)),
            positions=on_device(positions),
            slots=on_device(pages * block_size + positions % block_size),
            logit_rows=on_device(np.array(wanted, dtype=np.int64)),
            attention=AttentionBatch(on_device(offsets), on_device(starts), on_device(page_table)),
            logit_attention=AttentionBatch(
                on_device(logit_offsets), on_device(logit_starts), on_device(page_table[wanting])
            ),
        )
