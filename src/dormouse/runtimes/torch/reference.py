"""The kernels in plain torch: correct on every device, and what native ones are tested against.

Row invariance of `attend`: keys are read in whole tiles of `block_size` aligned to position 0, query rows are
padded to whole tiles of 16, and softmax statistics and outputs are combined tile after tile in that order. A
tile that is wholly masked for a row changes nothing of that row, to the bit. So the result of a row does not
depend on the rows and chunks that are computed with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dormouse.domain.cache_spec import CacheSpec, Half, Section
from dormouse.runtimes.torch.kernels import AttentionBatch, RowGroup
from dormouse.runtimes.torch.quantization import dequantize, quantize

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U32": torch.uint8}
"""Packed words are handled as their bytes: torch has few operations on uint32."""

_FLOOR = -1e30
"""Start of the running maximum: finite, so that a row with no visible key yet subtracts no infinities."""


class ReferenceKernels:
    """See `Kernels`."""

    def __init__(self, cache: CacheSpec) -> None:
        self._cache = cache

    def write_kv(self, arena: Tensor, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """See `Kernels.write_kv`."""
        size = self._cache.block_size
        pages, rows = slots // size, slots % size
        for half, x in zip(self._cache.layers[layer], (k, v), strict=True):
            if half.scales is None or half.biases is None:
                parts: dict[Section, Tensor] = {half.data: x}
            else:
                packed, scales, biases = quantize(x, half.bits, self._cache.group_size)
                parts = {half.data: packed, half.scales: scales, half.biases: biases}
            for section, values in parts.items():
                view = _view(arena, section)
                view[pages, :, rows] = values.to(view.dtype)

    def attend(
        self, arena: Tensor, layer: int, q: Tensor, batch: AttentionBatch, scale: float, window: int | None
    ) -> Tensor:
        """See `Kernels.attend`."""
        v_half = self._cache.layers[layer][1]
        out = torch.empty((*q.shape[:2], v_half.head_dim), dtype=q.dtype, device=q.device)
        for group in batch.groups:
            attended = self._attend_group(arena, layer, q, group, batch.page_table, scale, window)
            out[group.rows[group.is_row]] = attended[group.is_row].to(q.dtype)
        return out

    def _attend_group(
        self,
        arena: Tensor,
        layer: int,
        q: Tensor,
        group: RowGroup,
        page_table: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """fp32 `[m, padded, heads, v_head_dim]`; what padding rows hold means nothing."""
        k_half, v_half = self._cache.layers[layer]
        tile, kv_heads = self._cache.block_size, self._cache.num_kv_heads
        queries = _by_kv_head(q[group.rows].float() * scale, kv_heads)
        lanes, depth = queries.shape[:2]
        peak = queries.new_full((lanes, depth, 1), _FLOOR)
        total = queries.new_zeros((lanes, depth, 1))
        acc = queries.new_zeros((lanes, depth, v_half.head_dim))
        oldest = 0 if window is None else max(group.first_position - window + 1, 0)
        for start in range(oldest // tile * tile, group.num_keys, tile):
            pages = page_table[group.chunks, start // tile]
            keys = self._read(arena, k_half, pages, q.dtype)
            values = self._read(arena, v_half, pages, q.dtype)
            is_written = torch.arange(start, start + tile, device=q.device) < group.ends[:, None]
            # A row of a page that nobody wrote may hold NaN, which a weight of zero would not remove.
            values.masked_fill_(~is_written[:, None, :, None], 0.0)
            scores = torch.bmm(queries, keys.flatten(0, 1).transpose(1, 2))
            _hide(scores, group, start, tile, window)
            new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
            weights = scores.sub_(new_peak).exp_()
            decay = (peak - new_peak).exp_()
            total = total * decay + weights.sum(-1, keepdim=True)
            acc = acc * decay + torch.bmm(weights, values.flatten(0, 1))
            peak = new_peak
        return _by_row(acc / total, len(group.chunks), group.rows.shape[1])

    def _read(self, arena: Tensor, half: Half, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """One tile per page, `[pages, kv_heads, block_size, head_dim]` fp32, of values rounded to `dtype`."""
        data = _view(arena, half.data)[pages]
        if half.scales is None or half.biases is None:
            return data.to(dtype).float()
        scales, biases = _view(arena, half.scales)[pages], _view(arena, half.biases)[pages]
        wide = dequantize(data, scales, biases, half.bits, self._cache.group_size)
        return wide.to(dtype).float()


def _view(arena: Tensor, section: Section) -> Tensor:
    """The section of every page, `[num_pages, kv_heads, block_size, ...]`, sharing memory."""
    flat = arena[:, section.offset : section.offset + section.nbytes]
    return flat.view(_DTYPES[section.dtype]).view(arena.shape[0], *section.shape[:2], -1)


def _hide(scores: Tensor, group: RowGroup, start: int, tile: int, window: int | None) -> None:
    """Set the scores `[m * kv_heads, shared heads * padded, tile]` of keys out of sight to -inf, in place."""
    keys = torch.arange(start, start + tile, device=scores.device)
    positions = group.positions[:, :, None]
    hidden = keys > positions
    if window is not None:
        hidden |= keys <= positions - window
    m, padded = group.rows.shape
    scores.view(m, -1, padded, tile).masked_fill_(hidden[:, None], -torch.inf)


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """`[m, padded, heads, d]` to `[m * kv_heads, shared heads * padded, d]`."""
    m, padded, heads, dim = x.shape
    shared = x.view(m, padded, kv_heads, heads // kv_heads, dim)
    return shared.permute(0, 2, 3, 1, 4).reshape(m * kv_heads, -1, dim)


def _by_row(x: Tensor, m: int, padded: int) -> Tensor:
    """`[m * kv_heads, shared heads * padded, d]` to `[m, padded, heads, d]`."""
    return x.view(m, -1, padded, x.shape[-1]).transpose(1, 2)
